"""What a trajectory's page shows, as one line of JSON, and lines packed for the report."""

import gzip
import json
from collections.abc import Sequence
from typing import Any

from megatron_spear.tracking.recorded import Numbers, RecordedTrajectory, RecordedTurn

SCALE = 10_000
"""Log-probs are whole numbers of 1 / SCALE nats: as exact as the records, and half the size."""

_LEVEL = 6


def body_line(trajectory: RecordedTrajectory) -> str:
    """A trajectory but for what the list has, in ASCII without a line break."""
    reward = trajectory.reward
    body = {
        "prompt": trajectory.prompt,
        "error": trajectory.error,
        "parts": dict(reward.parts) if reward else {},
        "group_mean": trajectory.group_mean,
        "segment_marks": trajectory.segment_marks,
        "turns": [_turn(turn) for turn in trajectory.turns],
    }
    return json.dumps(body, separators=(",", ":"), allow_nan=False)


def pack(lines: Sequence[str]) -> bytes:
    """The lines, compressed; the same lines give the same bytes."""
    return gzip.compress("\n".join(lines).encode("ascii"), _LEVEL, mtime=0)


def _turn(turn: RecordedTurn) -> dict[str, Any]:
    """A turn's fields. Tokens are given by their lengths in ``text`` where they make it up, equal
    advantages by one number."""
    joined = "".join(turn.tokens) == turn.text
    tokens = {"lengths": [_units(t) for t in turn.tokens]} if joined else {"tokens": turn.tokens}
    return {
        "segment": turn.segment,
        "observation": turn.observation,
        "new_tokens": turn.num_observation_tokens,
        "text": turn.text,
        **tokens,
        "action": turn.action,
        "rollout": _scaled(turn.rollout_logprobs),
        "old": _scaled(turn.old_logprobs),
        "advantages": _one_if_equal(turn.advantages),
        "versions": [[span.policy_version, span.num_tokens] for span in turn.versions],
        "calls": [[call.name, call.arguments, call.succeeded] for call in turn.tool_calls],
        "finish": turn.finish_reason,
        "time_s": turn.time_s,
        "valid": turn.valid,
        "void": turn.void,
    }


def _units(text: str) -> int:
    """Length as JavaScript counts it: in UTF-16 units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _scaled(values: Numbers | None) -> list[int | None] | None:
    if values is None:
        return None
    return [None if value is None else round(value * SCALE) for value in values]


def _one_if_equal(values: Numbers | None) -> Any:
    return values[0] if values and len(set(values)) == 1 else values
