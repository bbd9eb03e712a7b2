"""From the start of a resumed run to its next step: seconds of each stage.

A tiny job is trained and stopped; then ROUNDS new processes resume it, and each says when it came
where. Stages:

    imports        the interpreter, this package's command, torch and Megatron-Core
    ranks          process groups
    model          panel, model or warm start found, environment workers, engine, policy
    checkpoint     the newest one verified by its hashes and loaded
    weights        into the engine
    step           the next step, to its end

    python tools/benchmarks/restart.py --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parents[2] / "examples" / "alfworld" / "quickstart.yaml"
Reached = dict[str, tuple[float, float]]
"""Seconds since the launch, and of them on a core, at the end of each stage."""
STAGES = ("imports", "ranks", "model", "checkpoint", "weights", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="resumed launches")
    parser.add_argument("--settings", nargs="*", default=[], help="on top of the quickstart's")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        resume(float(options.child[0]), Path(options.child[1]), options.child[2:])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [
            f"model.cache_dir={folder / 'cache'}",
            "sft.steps=20",
            "evaluation.games=4",
            "checkpoint.every=1",
            "tracking.wandb=false",
            f"run.steps={options.rounds + 2}",
            *options.settings,
        ]
        line = ["train", str(QUICKSTART), f"run.dir={folder / 'run'}", *settings]
        subprocess.run(
            [sys.executable, "-m", "megatron_spear.cli.main", *line, "run.stop_after=1"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rounds = [launch(folder, settings, step + 2) for step in range(options.rounds)]
        size = sum(f.stat().st_size for f in (folder / "run").rglob("step_*/**/*") if f.is_file())
    report(rounds, size)


def launch(folder: Path, settings: list[str], last: int) -> Reached:
    """One resumed launch that ends after step ``last``; when it came where."""
    told = folder / "told.json"
    line = ["train", f"resume={folder / 'run'}", *settings, f"run.stop_after={last}"]
    child = [sys.executable, __file__, "--child", str(time.monotonic()), str(told), *line]
    subprocess.run(child, check=True, stdout=subprocess.DEVNULL)
    found: Reached = json.loads(told.read_text())
    return found


def resume(started: float, told: Path, line: list[str]) -> None:
    """The command in this process, with a look at the clock where each stage ends."""
    from megatron_spear.cli.main import run
    from megatron_spear.trainer import jobs

    reached: Reached = {}

    def note(stage: str) -> None:
        reached.setdefault(stage, (time.monotonic() - started, time.process_time()))

    def patch() -> None:
        from megatron_spear.policy import parallel
        from megatron_spear.trainer import build
        from megatron_spear.trainer.run import SpearRun

        note("imports")
        after(parallel, "initialize", lambda: note("ranks"))
        after(build, "make_step", lambda: note("model"))
        after(SpearRun, "resume", lambda: note("checkpoint"))
        after(SpearRun, "_give_weights", lambda: note("weights"))
        after(SpearRun, "_track", lambda: note("step"))

    before = jobs._process_groups

    def patched(*args: Any) -> Any:
        patch()
        return before(*args)

    jobs._process_groups = patched  # type: ignore[assignment]
    run(line)
    told.write_text(json.dumps(reached))
    sys.stdout.flush()
    os._exit(0)


def after(owner: Any, name: str, note: Callable[[], None]) -> None:
    """Call ``note`` whenever the function has returned."""
    original = getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        note()
        return result

    setattr(owner, name, noting)


def report(rounds: list[Reached], size: int) -> None:
    print(f"{'stage':14}{'s':>8}{'core s':>8}   (medians of {len(rounds)} launches)")
    for stage, earlier in zip(STAGES, (None, *STAGES), strict=False):
        begun = [each[earlier] if earlier else (0.0, 0.0) for each in rounds]
        spent = [
            statistics.median(
                each[stage][kind] - before[kind] for each, before in zip(rounds, begun, strict=True)
            )
            for kind in (0, 1)
        ]
        print(f"{stage:14}{spent[0]:8.2f}{spent[1]:8.2f}")
    whole = [statistics.median(each["step"][kind] for each in rounds) for kind in (0, 1)]
    print(f"{'to the step':14}{whole[0]:8.2f}{whole[1]:8.2f}", end="")
    print(f"   (checkpoints of {size / 2**20:.1f} MiB in all)")


if __name__ == "__main__":
    main()
