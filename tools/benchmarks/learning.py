#!/usr/bin/env python3
"""Does it learn: SPEAR with several seeds from one cached warm start, as one table.

    python tools/benchmarks/learning.py [--seeds 0 1 2] [--games 256] [--jobs 2] [--dir DIR] [a.b=c]

Before and after are shares of won games on one fixed panel of generated games that no run trains
on; the interval is the paired 95 % interval of the difference, game by game. ``--jobs`` seeds run
at once and share the cores. A seed that was cut off in ``--dir`` goes on from its last checkpoint
(a finished one only plays its last evaluation again); one with other settings is refused. Aim: warm
start 0.20 to 0.50, mean gain >= 0.10.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--games", type=int, default=256, help="games on the panel")
    parser.add_argument("--jobs", type=int, default=2, help="seeds that run at once")
    parser.add_argument("--config", default="examples/alfworld/quickstart.yaml")
    parser.add_argument("--dir", type=Path, default=Path("runs/learning"))
    options, settings = parser.parse_known_args()
    settings.append(f"evaluation.games={options.games}")
    _spear("sft", options.config, *settings)
    with ThreadPoolExecutor(options.jobs) as at_once:
        runs = list(at_once.map(lambda seed: _run(options, seed, settings), options.seeds))
    panels = {run["panel_sha256"] for run in runs}
    assert len(panels) == 1, "one configuration gives one panel"
    print(f"panel: {runs[0]['panel_games']} games, sha256 {panels.pop()}")
    columns = ("before", "after", "gain")
    head = "".join(f"{name:>9}" for name in columns)
    print(f"{'seed':>6}{'steps':>7}{head}   95 % interval{'wall s':>9}")
    for seed, run in zip(options.seeds, runs, strict=True):
        low, high = run["success_gain_95"]
        print(
            f"{seed:6}{run['steps']:7}{run['success_before']:9.3f}{run['success_after']:9.3f}"
            f"{run['success_gain']:+9.3f}   {low:+.3f} to {high:+.3f}{run['wall_s']:8.0f}"
        )
    before, after, gain = (statistics.fmean(run[f"success_{c}"] for run in runs) for c in columns)
    print(f"{'mean':>6}{'':7}{before:9.3f}{after:9.3f}{gain:+9.3f}   (aim: at least +0.100)")


def _run(options: argparse.Namespace, seed: int, settings: list[str]) -> dict[str, Any]:
    """The summary of one seed's run."""
    folder = options.dir / f"seed-{seed}"
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    own = [f"run.seed={seed}", f"run.dir={folder}", f"run.threads={threads}"]
    if (folder / "config.yaml").exists():
        own.append(f"resume={folder}")
    _spear("train", options.config, *settings, *own)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def _spear(command: str, *arguments: str) -> None:
    """One command of the program; its warnings and errors are shown, its progress is not."""
    print(f"{command} {' '.join(arguments)}", file=sys.stderr, flush=True)
    program = [sys.executable, "-m", "megatron_spear.cli.main", command, *arguments]
    if subprocess.run(program, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"{command} did not end well; its last words are above")


if __name__ == "__main__":
    main()
