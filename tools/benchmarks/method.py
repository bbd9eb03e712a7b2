#!/usr/bin/env python3
"""What SPEAR costs beside its baseline Dr.BoT, as one table: replay store, clipping, step.

    python tools/benchmarks/method.py [--only PART ...] [--threads 2] [a.b=c ...]

- store: the replay store with ``--held`` trajectories (``replay_store.py``), which at 100,000 takes
  15 GB of disk, 9 GB of memory and some minutes.
- clip_cov: which of 1 M tokens covariance drops, against torch as the official code does it
  (``clip_cov.py``).
- step: a SPEAR step of the quickstart against a Dr.BoT step from the same warm start
  (``step_cost.py``); ``a.b=c`` are settings of this run.

Both sides of a row run interleaved in this process; figures are medians.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Row = tuple[str, str, str, str]
"""What was measured, ours, the other's, and their ratio with its aim."""


def _part(name: str) -> Any:
    """The benchmark beside this one that has ``rows``."""
    folder = str(Path(__file__).parent)
    if folder not in sys.path:  # by import, so that processes they start find it too
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _store(options: argparse.Namespace, folder: Path) -> list[Row]:
    rows: list[Row] = _part("replay_store").rows(options.held, folder)
    return rows


def _clip_cov(options: argparse.Namespace, folder: Path) -> list[Row]:
    rows: list[Row] = _part("clip_cov").rows(options.tokens, options.rounds)
    return rows


def _step(options: argparse.Namespace, folder: Path) -> list[Row]:
    rows: list[Row] = _part("step_cost").rows(
        options.config, options.settings, options.steps, options.threads, folder
    )
    return rows


PARTS: Mapping[str, Callable[[argparse.Namespace, Path], list[Row]]] = {
    "store": _store,
    "clip_cov": _clip_cov,
    "step": _step,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; default all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--held", type=int, default=100_000, help="trajectories in the store")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="masked tokens of clip_cov")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of clip_cov")
    parser.add_argument("--steps", type=int, default=8, help="pairs of steps")
    parser.add_argument("--config", default="examples/alfworld/quickstart.yaml")
    options, settings = parser.parse_known_args()
    options.settings = settings
    torch.set_num_threads(options.threads)
    lines = [("what", "ours", "other", "ratio (aim)"), ("---",) * 4]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in options.only or PARTS:
                (place := Path(folder) / name).mkdir()
                lines += PARTS[name](options, place)
    finally:  # what was measured before a part that fails
        print(f"\n{options.threads} thread(s)")
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
