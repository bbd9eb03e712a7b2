"""Runs of an experiment: one process a seed, each resumed where it was cut off."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from experiment import Experiment
from outcome import collect, read_outcome, require_same, settings_of

from megatron_spear.config.load import CONFIG_NAME
from megatron_spear.errors import DataError, SpearError


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One run to make: its settings, where its result goes and where it works meanwhile."""

    arm: str
    number: int
    config: Path
    settings: tuple[str, ...]
    result: Path
    folder: Path

    @property
    def name(self) -> str:
        """Arm and seed, for messages."""
        return f"{self.arm} seed {self.number}"


def seeds_of(
    experiment: Experiment, config: Path, further: Sequence[str], out: Path, work: Path
) -> list[Seed]:
    """All runs of an experiment, the first seed of every arm first, so that a part of them can be
    compared already."""
    numbers = sorted({number for arm in experiment.arms for number in experiment.seeds_of(arm)})
    return [
        Seed(
            arm=arm,
            number=number,
            config=config,
            settings=(*experiment.settings_of(arm), *further),
            result=out / arm / f"seed-{number}.json",
            folder=work / arm / f"seed-{number}",
        )
        for number in numbers
        for arm in experiment.arms
        if number in experiment.seeds_of(arm)
    ]


def require_results_of(seeds: Sequence[Seed]) -> None:
    """Raises ConfigError where a result is there and of other settings."""
    for seed in seeds:
        if seed.result.is_file():
            there = read_outcome(seed.result).settings
            require_same(there, settings_of(seed.config, seed.settings), seed.result)


def run_all(seeds: Sequence[Seed], jobs: int) -> list[str]:
    """Make all runs that have no result yet, ``jobs`` at once; gives what went wrong, a line
    each."""
    todo = [seed for seed in seeds if not seed.result.is_file()]
    print(
        f"{len(seeds) - len(todo)} of {len(seeds)} runs are there, {len(todo)} to make", flush=True
    )
    if not todo:
        return []
    failed = _warm_start(todo[0])
    if failed:
        return [failed]
    with ThreadPoolExecutor(jobs) as at_once:
        found = list(at_once.map(_run, todo))
    return [problem for problem in found if problem]


def _warm_start(seed: Seed) -> str | None:
    """Make the warm start that the runs share, so that the first ones do not make it twice."""
    own = (f"run.dir={seed.folder}", "run.threads=0")
    return _spear("sft", seed, own, seed.folder.parent / "warm-start.log")


def _run(seed: Seed) -> str | None:
    """One run and its result; gives what went wrong, so that the others go on."""
    try:
        problem = _train(seed)
        if problem is None:
            _keep(seed)
        return problem
    except (SpearError, OSError, ValueError) as error:
        return f"{seed.name}: {error}"
    except KeyError as error:
        return f"{seed.name}: {seed.folder} has no {error}"


def _train(seed: Seed) -> str | None:
    """The run, unless it has ended already; gives what went wrong."""
    if (seed.folder / "summary.json").is_file():
        return None
    own = [f"run.seed={seed.number}", f"run.dir={seed.folder}", "run.threads=1"]
    if (seed.folder / CONFIG_NAME).is_file():
        own.append(f"resume={seed.folder}")
    print(f"{seed.name}: {'goes on' if own[3:] else 'begins'}", flush=True)
    return _spear("train", seed, own, seed.folder.with_suffix(".log"))


def _keep(seed: Seed) -> None:
    """The result of a run that has ended; raises where it is not of these settings or of another
    panel than the arm's other results."""
    given = settings_of(seed.config, seed.settings)
    require_same(settings_of(seed.folder / CONFIG_NAME, ()), given, seed.folder)
    outcome = collect(seed.arm, seed.number, given, seed.folder)
    for path in sorted(seed.result.parent.parent.glob("*/seed-*.json")):
        if read_outcome(path).panel_sha256 != outcome.panel_sha256:
            raise DataError(
                f"{seed.folder} was played on another panel than {path}; give the same games, or "
                "another --out"
            )
    outcome.write(seed.result)
    shutil.rmtree(seed.folder)
    last = np.nanmean(outcome.won[-1])
    print(f"{seed.name}: {last:.3f} in {outcome.wall_s:.0f} s", flush=True)


def _spear(command: str, seed: Seed, own: Sequence[str], log: Path) -> str | None:
    """One command of the program with its output in ``log``; gives what went wrong."""
    quiet = ("tracking.wandb=false", "tracking.progress=false")
    program = [sys.executable, "-m", "megatron_spear.cli.main", command, str(seed.config)]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        status = subprocess.run(
            [*program, *seed.settings, *quiet, *own],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        ).returncode
    if status == 0:
        return None
    fate = signal.Signals(-status).name if status < 0 else f"status {status}"
    words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    return f"{seed.name}: {command} ended with {fate}; {log} ends with: {' | '.join(words)}"
