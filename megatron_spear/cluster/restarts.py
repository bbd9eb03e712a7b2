"""Whether a run goes on after an attempt: it is done, starts again, or has failed.

    stopped by a signal, saved                    AGAIN   costs nothing
    out of time without a new checkpoint          AGAIN   costs nothing; the third in a row: FAILED
    some nodes were found bad before the start    AGAIN   costs 1
    a crash after a new checkpoint                AGAIN   costs 1
    a crash without one                           AGAIN   costs 2; the third in a row: FAILED
    more spent than ``cluster.max_restarts``      FAILED
    a mistake that no restart mends               FAILED

The cost of each attempt is in its own ``ended.json``. A launch by the user (``grant_restarts``)
begins with the whole budget; attempts before it count no more.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from megatron_spear.cluster.attempt import Attempt, attempts, newest_checkpoint
from megatron_spear.config.cluster import ClusterSection, SlurmSection
from megatron_spear.files import write_whole

USAGE_STATUS = 2
"""Exit status of a command whose settings or files cannot work."""
BAD_NODES_STATUS = 3
"""Exit status of a preflight that found bad nodes."""
TIME_SIGNAL = "USR1"
"""What a job is sent before its time limit; preemption and ``scancel`` send another signal."""
LOST_STATUS = -1
"""Stands for the exit status of an attempt that ended unseen, together with its machine."""

_MAX_IN_A_ROW = 3


class Verdict(StrEnum):
    """What becomes of the run."""

    DONE = "done"
    AGAIN = "again"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What becomes of the run, and why, in words for the user."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ended:
    """An attempt as ``ended.json`` keeps it. ``stuck``: a crash without a new checkpoint; ``idle``:
    a stop by the time limit without one."""

    verdict: str
    reason: str
    status: int
    from_step: int
    to_step: int
    cost: int = 0
    stuck: bool = False
    idle: bool = False


def grant_restarts(run: Path) -> None:
    """A launch by the user: attempts so far count no more against the budget."""
    first = max((attempt.number for attempt in attempts(run)), default=-1) + 1
    write_whole(_budget_file(run), json.dumps({"first_attempt": first}) + "\n")


def judge(attempt: Attempt, status: int, cluster: ClusterSection, told: str = "") -> Judgement:
    """Whether the run is done, starts again or has failed, now that ``attempt`` has ended.

    ``status`` is the exit status of the whole attempt: that of the supervisor where there is one
    node, of ``srun`` where there are more; 3 of a preflight; ``LOST_STATUS`` where nobody saw the
    end. ``told`` is the last signal that the job was sent, ``USR1`` say; empty where there was none
    or nobody knows. The judgement is kept in ``ended.json``; judging again replaces it.

    Example: an attempt that ends with status 1, after checkpoint 20 where it began at 10, with
    ``max_restarts=10``: ``again``, "crashed with status 1 after step 20; 1 of 10 restarts spent".
    """
    before = _judged_before(attempt)
    ended = _judged(attempt, status, cluster, before, told)
    write_whole(attempt.ended_file, json.dumps(asdict(ended)) + "\n")
    return Judgement(verdict=Verdict(ended.verdict), reason=ended.reason)


def judge_lost(run: Path, cluster: ClusterSection) -> Judgement | None:
    """Judge the newest attempt if nobody has: its machine went down, or was taken away.

    To be called before a further attempt begins, so that a job which its cluster restarts by itself
    spends the budget too. None if there is nothing to judge.
    """
    last = attempts(run)[-1:]
    if not last or last[0].ended_file.exists() or last[0].number < _first_attempt(run):
        return None
    return judge(last[0], LOST_STATUS, cluster)


def _judged(
    attempt: Attempt,
    status: int,
    cluster: ClusterSection,
    before: Sequence[_Ended],
    told: str,
) -> _Ended:
    begun, newest = _read(attempt.begun_file).get("step", 0), newest_checkpoint(attempt.run)

    def ended(verdict: Verdict, reason: str, **how: Any) -> _Ended:
        return _Ended(
            verdict=verdict, reason=reason, status=status, from_step=begun, to_step=newest, **how
        )

    hopeless, stopped = _read(attempt.hopeless_file), _read(attempt.stopped_file)
    if hopeless or status == USAGE_STATUS:
        reason = hopeless.get("reason", f"exit status {status}; the log of {attempt.path} says why")
        return ended(Verdict.FAILED, f"no restart would mend this: {reason}")
    if attempt.stopped_file.exists():
        why, step = stopped.get("reason", "a signal"), stopped.get("step", newest)
        reason, idle = f"stopped by {why}, saved after step {step}", False
        if told == TIME_SIGNAL and newest <= begun:
            idle, in_a_row = True, _in_a_row(before, "idle") + 1
            if in_a_row >= _MAX_IN_A_ROW:
                reason = _never_ready(reason, in_a_row, attempt.run, cluster.slurm)
                return ended(Verdict.FAILED, reason, idle=True)
        return ended(Verdict.AGAIN, reason, idle=idle)
    missing = _nodes_not_done(attempt, cluster.trainer_nodes)
    if status == 0 and not missing:
        return ended(Verdict.DONE, f"all trainer nodes have ended well, at step {newest}")

    cost, stuck, what = _crash(status, missing, begun, newest, cluster.trainer_nodes)
    spent, in_a_row = cost + sum(e.cost for e in before), _in_a_row(before, "stuck") + 1
    if stuck and in_a_row >= _MAX_IN_A_ROW:
        reason = f"{what}; {in_a_row} crashes in a row without a new checkpoint"
        return ended(Verdict.FAILED, reason, cost=cost, stuck=stuck)
    if spent > cluster.max_restarts:
        reason = (
            f"{what}; that would spend {spent} restarts of cluster.max_restarts="
            f"{cluster.max_restarts}"
        )
        return ended(Verdict.FAILED, reason, cost=cost, stuck=stuck)
    reason = f"{what}; {spent} of {cluster.max_restarts} restarts spent"
    return ended(Verdict.AGAIN, reason, cost=cost, stuck=stuck)


def _never_ready(reason: str, in_a_row: int, run: Path, slurm: SlurmSection) -> str:
    """What to do where the time limit comes before the next checkpoint, again and again."""
    return (
        f"{reason}; {in_a_row} stops in a row without a new checkpoint: what comes before it takes "
        f"longer than the {slurm.time_limit_s - slurm.signal_before_s} s until the job is told to "
        "stop; raise cluster.slurm.time_limit, or make the warm start beforehand (megatron-spear "
        f"sft resume={run}), or shorten the evaluation (evaluation.games); then launch it again "
        "with resume="
    )


def _crash(
    status: int, missing: int, begun: int, newest: int, trainer_nodes: int
) -> tuple[int, bool, str]:
    """What a crash costs, whether it came without a new checkpoint, and what it was."""
    if status == BAD_NODES_STATUS:
        return 1, False, "the preflight found bad nodes"
    stuck = newest <= begun
    if status == LOST_STATUS:
        what = "ended unseen (a node went down, or the job was taken away before it had saved)"
    elif status == 0:
        what = f"{missing} of {trainer_nodes} trainer nodes did not say that they have ended well"
    else:
        what = f"crashed with status {status}"
    progress = "without a new checkpoint" if stuck else "with a new checkpoint"
    return 2 if stuck else 1, stuck, f"{what} at step {newest}, {progress}"


def _nodes_not_done(attempt: Attempt, trainer_nodes: int) -> int:
    names = (attempt.done / f"trainer_{index}" for index in range(trainer_nodes))
    return sum(not path.exists() for path in names)


def _in_a_row(before: Sequence[_Ended], kind: Literal["stuck", "idle"]) -> int:
    """Attempts of a kind since the last new checkpoint; all others change nothing."""
    count = 0
    for ended in reversed(before):
        if ended.to_step > ended.from_step:
            break
        count += ended.stuck if kind == "stuck" else ended.idle
    return count


def _judged_before(attempt: Attempt) -> list[_Ended]:
    """Those of the same launch that came before, oldest first; unjudged ones are passed over."""
    first = _first_attempt(attempt.run)
    records = (
        _read(other.ended_file)
        for other in attempts(attempt.run)
        if first <= other.number < attempt.number
    )
    return [_Ended(**record) for record in records if record]


def _first_attempt(run: Path) -> int:
    """The first attempt that counts against the budget."""
    return int(_read(_budget_file(run)).get("first_attempt", 0))


def _read(path: Path) -> dict[str, Any]:
    """A small JSON file; empty if it is not there or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _budget_file(run: Path) -> Path:
    return run / "launch.json"
