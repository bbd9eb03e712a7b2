#!/usr/bin/env python3
"""Where a SPEAR step's time goes: runs the quickstart for a few steps and prints one table.

    python tools/benchmarks/step_overhead.py [--steps 8] [settings ...]

The share outside rollout and training (aim: at most 5 %) is all but rollout, old log-probs,
replayed rows' log-probs (a forward pass of training) and the optimizer step. The first step is
left out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_spear.trainer.timing import PRODUCTIVE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="trainer steps to run, >= 2")
    parser.add_argument("--config", default="examples/alfworld/quickstart.yaml")
    options, settings = parser.parse_known_args()
    if options.steps < 2:
        parser.error(f"--steps: got {options.steps}, expected at least 2 (the first is left out)")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "megatron_spear.cli.main", "train", options.config]
        fixed = [f"run.dir={run}", f"run.steps={options.steps}", "evaluation.games=8"]
        quiet = ["checkpoint.every=0", "curriculum.replay_warmup_steps=0"]
        subprocess.run([*command, *fixed, *quiet, *settings], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step_s" in line][1:]
    total = statistics.median(s["time/step_s"] for s in steps)
    names = sorted(
        {k for s in steps for k in s if k.startswith("time/") and k.endswith("_s")}
        - {"time/step_s", "time/eval_s"}
    )
    print(f"{'phase':24}{'median s':>10}{'share':>9}")
    for name in names:
        value = statistics.median(s.get(name, 0.0) for s in steps)
        print(
            f"{name.removeprefix('time/').removesuffix('_s'):24}{value:10.3f}{value / total:9.1%}"
        )
    outside = statistics.median(
        1 - sum(s.get(f"time/{p}_s", 0.0) for p in PRODUCTIVE) / s["time/step_s"] for s in steps
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{'step':24}{total:10.3f}{1:9.1%}")
    print(f"{'outside rollout, training':24}{'':10}{outside:8.1%}   (aim: at most 5 %)")
    print(f"{'peak memory':24}{peak:9.2f} GiB   over {len(steps)} steps")


if __name__ == "__main__":
    main()
