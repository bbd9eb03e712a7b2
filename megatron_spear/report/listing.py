"""The list of a report's trajectories and replayed rows: a column a field, without any text of a
turn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_spear.tracking.recorded import RecordedReplay, RecordedStep, RecordedTrajectory

NO_CHUNK = -1
"""In the column ``chunk``: the body of this trajectory is not in the report."""

_MAX_ERROR = 200
Columns = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One trajectory of the list, and how good it was (its reward; failed ones come last)."""

    values: dict[str, Any]
    goodness: float


@dataclass(kw_only=True, slots=True)
class Listing:
    """Columns in the order of ``add``: oldest step first."""

    trajectories: Columns = field(default_factory=dict)
    replayed: Columns = field(default_factory=dict)

    def add(
        self,
        run: int,
        step: int,
        rows: Sequence[Row],
        replayed: Sequence[dict[str, Any]],
        place: dict[int, tuple[int, int]],
    ) -> None:
        """Append a step's rows; ``place`` has the chunk and the line in it of those that are in the
        report, by their number in the step."""
        for number, row in enumerate(rows):
            chunk, line = place.get(number, (NO_CHUNK, 0))
            values = {"run": run, "step": step, "chunk": chunk, "line": line, **row.values}
            for name, value in values.items():
                self.trajectories.setdefault(name, []).append(value)
        for values in replayed:
            for name, value in {"run": run, "at": step, **values}.items():
                self.replayed.setdefault(name, []).append(value)


def rows_of(step: RecordedStep) -> tuple[Row, ...]:
    """The step's trajectories as rows."""
    return tuple(_row(trajectory) for trajectory in step.trajectories)


def replayed_of(step: RecordedStep) -> tuple[dict[str, Any], ...]:
    """The step's replayed rows."""
    return tuple(_replayed(row) for row in step.replayed)


def _row(trajectory: RecordedTrajectory) -> Row:
    reward = trajectory.reward
    calls = [call for turn in trajectory.turns for call in turn.tool_calls]
    advantages = [
        value for turn in trajectory.turns for value in turn.advantages or () if value is not None
    ]
    values = {
        "group": trajectory.group,
        "member": trajectory.member,
        "prompt": trajectory.prompt_id,
        "kind": trajectory.kind,
        "env": trajectory.env,
        "status": trajectory.status,
        "won": trajectory.won,
        "total": reward.total if reward else None,
        "outcome": reward.outcome if reward else None,
        "intrinsic": reward.intrinsic if reward else None,
        "format": reward.format if reward else None,
        "env_reward": trajectory.env_reward,
        "advantage": round(sum(advantages) / len(advantages), 6) if advantages else None,
        "turns": len(trajectory.turns),
        "tokens": sum(len(turn.rollout_logprobs) for turn in trajectory.turns),
        "calls": len(calls),
        "good_calls": sum(call.succeeded for call in calls),
        "marks": list(trajectory.marks),
        "trained": trajectory.trained,
        "stored": trajectory.stored,
        "left_out": trajectory.left_out,
        "error": trajectory.error[:_MAX_ERROR],
    }
    return Row(values=values, goodness=reward.total if reward else float("-inf"))


def _replayed(row: RecordedReplay) -> dict[str, Any]:
    return {
        "group": row.group,
        "member": row.member,
        "prompt": row.prompt_id,
        "from": row.step,
        "version": row.policy_version,
        "age": row.age,
        "total": row.reward.total,
        "outcome": row.reward.outcome,
        "intrinsic": row.reward.intrinsic,
        "format": row.reward.format,
        "stored_advantage": row.stored_advantage,
        "advantage": row.advantage,
        "baseline": row.baseline,
        "weight": row.weight,
        "segments": list(row.segments),
        "tokens": row.num_tokens,
        "calls": row.num_tool_calls,
        "old": row.old_logprob_mean,
        "rollout": row.rollout_logprob_mean,
        "ratio": row.ratio_mean,
    }
