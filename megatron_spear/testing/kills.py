"""Runs that are killed (SIGKILL) at random moments and resumed, beside the same run left alone.

    job = Killed(MODES["synchronous"], folder, cache=folder / "cache", seed=3)
    alone = job.left_alone()
    killed, report = job.killed()
    differences(alone, killed)      # [] where they are the same run

Processes are forked from a server that has imported what a run needs, so that a start takes a
second or two and a kill may come at any moment from then on.
"""

import json
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_spear.config.load import load_config
from megatron_spear.deadlines import install_stop_signals
from megatron_spear.testing.ranks import fork_context, run_ranks
from megatron_spear.trainer.consumption import read_consumed

MODES = {
    "synchronous": (),
    "deterministic": ("rollout.max_lag=2", "rollout.schedule=deterministic"),
    "continuous": ("rollout.max_lag=2",),
}
"""Settings by the way rollouts and training take turns."""

PROMPTS_PER_STEP = 2
RUN_S = 300.0
"""Longest run of one process."""

# Seconds on one core: replay from the third step on, a learning rate that moves, two optimizer
# steps a rollout, a checkpoint every second step.
_JOB = (
    "model.tiny.hidden_size=32",
    "model.tiny.num_layers=2",
    "model.tiny.ffn_size=64",
    "env.generator={min_objects: 4, max_objects: 7, max_receptacles: 10}",
    "env.max_turns=8",
    "env.task_types=[pick_and_place_simple, look_at_obj_in_light]",
    "sft.steps=100",
    "sft.trajectories_per_step=8",
    "sft.explore=0",
    "sft.optimizer.lr=0.01",
    "sft.optimizer.warmup_steps=2",
    f"rollout.prompts_per_step={PROMPTS_PER_STEP}",
    "rollout.group_size=4",
    # One context at a time: which ones share the engine's batch is a matter of timing, and rounds.
    "rollout.max_slots=1",
    "algorithm.mini_batches=2",
    "algorithm.keep_groups_fraction=1.0",
    "policy.optimizer.lr=0.002",
    "policy.optimizer.schedule=cosine",
    "policy.optimizer.min_lr=0.0002",
    "policy.optimizer.warmup_steps=4",
    "replay.rows_per_step=2",
    "curriculum.replay_warmup_steps=0",
    "evaluation.games=2",
    "checkpoint.every=2",
    "run.steps=12",
    "run.threads=1",
    "tracking.wandb=false",
    "tracking.curves=false",
)

_IN_THE_START = 0.25
"""Share of the kills that come before the first step of a start."""
_CLOCK = ("time/", "time")
"""What no two runs have in common."""
_ROUNDED = "mismatch/"
"""Metrics of the engine's log-probs: which contexts share a batch is a matter of timing, and it
rounds accordingly."""


@dataclass
class Report:
    """What the killed run went through: starts, and for each kill the newest step by then."""

    starts: int = 0
    killed_after: list[int] = field(default_factory=list)


class Killed:
    """One job, run in ``folder``: once left alone, once killed again and again.

    ``settings`` come over those of a tiny run on household games; ``seed`` is the run's, and draws
    the moments: a kill comes within two steps of a drawn one, at most ``most_steps`` after the
    start. The warm start is taken from ``cache``, or made there.
    """

    def __init__(
        self,
        settings: Sequence[str],
        folder: Path,
        *,
        cache: Path,
        seed: int,
        most_steps: int = 3,
    ) -> None:
        own = (f"model.cache_dir={cache}", f"run.seed={seed}")
        self.arguments = [*_JOB, *own, *settings]
        self._folder, self._most_steps = folder, most_steps
        self._random = random.Random(f"kills of seed {seed}")
        self._start_s = self._step_s = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def left_alone(self) -> Path:
        """The run directory of the job that nobody disturbs; measures how long it takes.

        Raises RuntimeError where it does not end well.
        """
        run = self._folder / "alone"
        self._wait_well(self._process("sft", *self.arguments))  # so that it is in the cache
        began = time.time()
        self._wait_well(self._start(run))
        times = [record["time"] for record in _records(run / "metrics.jsonl")]
        self._start_s = times[0] - began
        self._step_s = (times[-1] - times[0]) / max(1, len(times) - 1)
        return run

    def left_alone_on(self, ranks: int) -> Path:
        """The run directory of the job that nobody disturbs, on several ranks."""
        run = self._folder / "alone"
        self._wait_well(self._process("sft", *self.arguments))
        run_ranks(
            _job, ranks, "train", [*self.arguments, f"run.dir={run}"], self._log, timeout_s=RUN_S
        )
        return run

    def killed(self) -> tuple[Path, Report]:
        """The run directory of the job that was killed until it had ended all the same.

        Raises RuntimeError where a process ends by itself in any other way.
        """
        run, report = self._folder / "killed", Report()
        while True:
            report.starts += 1
            before, process = newest_step(run), self._start(run)
            if self._random.random() < _IN_THE_START:
                status = self._wait(process, self._random.uniform(0, self._start_s))
            else:
                self._until_step(process, run, before + self._random.randint(1, self._most_steps))
                status = self._wait(process, self._random.uniform(0, 2 * self._step_s))
            if status == 0:
                return run, report
            if status != -signal.SIGKILL:
                raise RuntimeError(f"start {report.starts} ended with {status}; see {self._log}")
            report.killed_after.append(newest_step(run))

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _start(self, run: Path) -> Any:
        if (run / "config.yaml").is_file():
            return self._process("train", f"resume={run}")
        return self._process("train", *self.arguments, f"run.dir={run}")

    def _process(self, work: str, *arguments: str) -> Any:
        process = fork_context().Process(target=_job, args=(work, arguments, self._log))
        process.start()
        return process

    def _wait_well(self, process: Any) -> None:
        status = self._wait(process, RUN_S)
        if status != 0:
            raise RuntimeError(f"the run left alone ended with status {status}; see {self._log}")

    def _until_step(self, process: Any, run: Path, step: int) -> None:
        """Until the run has recorded this step, or has ended; steps take as long as they take on
        the machine now."""
        end = time.monotonic() + RUN_S
        while newest_step(run) < step and time.monotonic() < end:
            process.join(0.01)
            if process.exitcode is not None:
                return

    def _wait(self, process: Any, limit_s: float) -> int:
        """Its exit status; it is killed after ``limit_s``."""
        process.join(limit_s)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        return int(process.exitcode)


def _job(work: str, arguments: Sequence[str], log: Path) -> None:
    """``train`` or ``sft``, as the command runs it; output goes to the log."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    stop = install_stop_signals()
    import torch

    torch.set_num_threads(1)
    from megatron_spear.trainer import jobs

    (jobs.train if work == "train" else jobs.warm_start)(load_config(None, arguments), stop)


def newest_step(run: Path) -> int:
    """The newest step that the run has recorded; 0 before the first."""
    return max((record["step"] for record in _records(run / "metrics.jsonl")), default=0)


def differences(alone: Path, killed: Path) -> list[str]:
    """What the two runs do not have in common, in words: metrics of every step, consumed prompts
    and exported weights; [] = they are the same run."""
    found = [
        *_metric_differences(steps_of(alone), steps_of(killed)),
        *_consumption_differences(alone, killed),
    ]
    if not same_weights(alone, killed):
        found.append("the exported weights differ")
    return found


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """Training metrics by step, without the clock's. Raises ValueError for a step that is there
    twice."""
    steps: dict[int, dict[str, Any]] = {}
    for record in _records(run / "metrics.jsonl"):
        if "rollout/num_trajectories" not in record:
            continue
        if record["step"] in steps:
            raise ValueError(f"step {record['step']} is in {run} twice")
        steps[record["step"]] = {k: v for k, v in record.items() if not k.startswith(_CLOCK)}
    return steps


def twice_or_missing(run: Path, prompts_per_step: int) -> list[str]:
    """Prompts that were consumed twice or passed over, in words; for prompts at positions 0, 1, ...
    of which each step takes as many."""
    lines = read_consumed(run / "consumed.jsonl")
    expected = [
        (step, step_position)
        for step in steps_of(run)
        for step_position in range((step - 1) * prompts_per_step, step * prompts_per_step)
    ]
    got = [(line["step"], line["position"]) for line in lines]
    return [] if got == expected else [f"consumed {got}, expected {expected}"]


def same_weights(one: Path, other: Path) -> bool:
    """True where both runs exported the same weights, to the last bit."""
    from safetensors.numpy import load_file

    expected, found = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    return expected.keys() == found.keys() and all(
        expected[name].tobytes() == found[name].tobytes() for name in expected
    )


def _metric_differences(
    expected: Mapping[int, Mapping[str, Any]], found: Mapping[int, Mapping[str, Any]]
) -> list[str]:
    if list(expected) != list(found):
        return [f"steps {list(found)}, expected {list(expected)}"]
    return [
        f"{name} at step {step}: {found[step].get(name)}, expected {record.get(name)}"
        for step, record in expected.items()
        for name in {*record, *found[step]}
        if not _equal(name, record.get(name), found[step].get(name))
    ]


def _equal(name: str, one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    limit = 1e-5 if name.startswith(_ROUNDED) else 1e-9 + 1e-6 * abs(one)
    return bool(abs(one - other) <= limit)


def _consumption_differences(alone: Path, killed: Path) -> list[str]:
    expected, found = (read_consumed(run / "consumed.jsonl") for run in (alone, killed))
    return [] if expected == found else [f"consumed {found}, expected {expected}"]


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of records, in order."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
