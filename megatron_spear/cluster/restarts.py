"""Whether a run goes on after an attempt: it has ended, is to be started again, or is given up.

A run that was stopped (a signal, the time limit, preemption) has saved and goes on. One that
crashed goes on while ``cluster.max_restarts`` lasts, but only if crashes lead somewhere: two in a
row without a new checkpoint end it, and so do settings or data that cannot work. Nothing is kept
besides what attempts leave: a crash is an attempt that ended in no other way.
"""

import json
from dataclasses import dataclass
from enum import StrEnum

from megatron_spear.cluster.attempt import Attempt, attempts, newest_checkpoint


class Verdict(StrEnum):
    """What becomes of the run."""

    DONE = "done"
    AGAIN = "again"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What becomes of the run, and why, in words for its user."""

    verdict: Verdict
    reason: str


def judge(attempt: Attempt, status: int, *, max_restarts: int, trainer_nodes: int) -> Judgement:
    """What to do after the newest attempt of a run, which ended with exit ``status``.

    Example: a first attempt that ends with status 1 after a checkpoint was written is started
    again, as crash 1 of ``max_restarts``.
    """
    if attempt.refusal_file.is_file():
        told = attempt.refusal_file.read_text(encoding="utf-8").strip()
        return Judgement(verdict=Verdict.FAILED, reason=f"starting again would not help: {told}")
    if attempt.stopped_file.is_file():
        return Judgement(verdict=Verdict.AGAIN, reason=_stopped(attempt))
    if status == 0 and attempt.num_done() >= trainer_nodes:
        return Judgement(verdict=Verdict.DONE, reason="the run has ended")
    why = f"it ended with status {status}" if status else "not all trainer nodes ended"
    return _after_a_crash(attempt, why, max_restarts)


def _after_a_crash(attempt: Attempt, why: str, max_restarts: int) -> Judgement:
    every = attempts(attempt.run)
    begun = [one.begun_at() for one in every]
    reached = [*begun[1:], newest_checkpoint(attempt.run)]
    crashed = [not one.stopped_file.is_file() for one in every]
    crashes = sum(crashed)
    gained = [after > before for before, after in zip(begun, reached, strict=True)]
    if crashes > max_restarts:
        return Judgement(
            verdict=Verdict.FAILED,
            reason=f"{why}; it has crashed {crashes} times and cluster.max_restarts={max_restarts}",
        )
    if crashed[-2:] == [True, True] and not any(gained[-2:]):
        return Judgement(
            verdict=Verdict.FAILED,
            reason=f"{why}; the attempt before crashed too, and neither wrote a new checkpoint "
            f"(the newest is of step {reached[-1]}): the logs in {attempt.path / 'log'} say why",
        )
    return Judgement(
        verdict=Verdict.AGAIN,
        reason=f"{why}; crash {crashes} of at most {max_restarts}, it goes on from step "
        f"{reached[-1]}",
    )


def _stopped(attempt: Attempt) -> str:
    try:
        record = json.loads(attempt.stopped_file.read_text(encoding="utf-8"))
        return f"it was stopped and has saved step {record['step']} ({record['reason']})"
    except (OSError, ValueError, KeyError):
        return "it was stopped"
