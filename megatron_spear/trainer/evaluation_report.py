"""The results of an evaluation as files and as a table.

evaluation.json      the statistics, the panel's sha256 and the settings that were played with
trajectories.jsonl   one line an attempt: who won, and every turn as text
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_spear.files import replacing, write_whole
from megatron_spear.types import Trajectory, TrajectoryGroup, Turn

RESULT_FILE = "evaluation.json"
TRAJECTORIES_FILE = "trajectories.jsonl"


def write_report(
    folder: Path, result: Mapping[str, Any], groups: Sequence[TrajectoryGroup]
) -> None:
    """Write both files, each whole or not at all; the result last. Raises OSError."""
    with replacing(folder / TRAJECTORIES_FILE) as file:
        for record in trajectory_records(groups):
            file.write((json.dumps(record) + "\n").encode())
    write_whole(folder / RESULT_FILE, json.dumps(dict(result), indent=2) + "\n")


def trajectory_records(groups: Sequence[TrajectoryGroup]) -> Iterator[dict[str, Any]]:
    """One record an attempt, failed ones too, by prompt and attempt."""
    for group in groups:
        for trajectory in sorted((*group.members, *group.failures), key=lambda t: t.id.member):
            yield trajectory_record(trajectory)


def trajectory_record(trajectory: Trajectory) -> dict[str, Any]:
    """Plain values of one attempt; ``won`` and ``score`` are None where it failed.

    A turn has the observation that was answered, the answer's text and the action in it.
    """
    prompt, failed = trajectory.prompt, trajectory.status.failed
    return {
        "prompt_id": prompt.prompt_id,
        "kind": prompt.kind,
        "attempt": trajectory.id.member,
        "status": trajectory.status.value,
        "won": None if failed else trajectory.won,
        "score": None if failed else trajectory.env_reward,
        "messages": [dict(message) for message in prompt.messages],
        "turns": [_turn_record(turn) for turn in trajectory.turns],
        "info": dict(trajectory.info),
    }


def _turn_record(turn: Turn) -> dict[str, Any]:
    return {
        "observation": turn.observation,
        "text": turn.text,
        "action": turn.action_text,
        "valid": turn.valid,
        "void": turn.void,
        "finish_reason": turn.finish_reason,
        "action_tokens": len(turn.action_tokens),
        "tool_calls": [asdict(call) for call in turn.tool_calls],
    }


def table_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The statistics as rows to show: name, value, 95 % interval.

    Example: ``("mean@4", "0.583", "0.250 to 0.875")``.
    """
    rows = [_row(f"mean@{result['attempts']}", result["mean_at_n"])]
    rows += [_row(f"  {kind}", estimate) for kind, estimate in result["by_kind"].items()]
    rows += [_row(f"pass@{k}", estimate) for k, estimate in result["pass_at_k"].items()]
    rows.append(_row("environment score", result["score"]))
    means = result["trajectories"]
    for label, key, form in (
        ("turns a trajectory", "turns_mean", ".1f"),
        ("tokens a trajectory", "action_tokens_mean", ".1f"),
        ("invalid turns", "invalid_turn_fraction", ".3f"),
        ("void turns", "void_turn_fraction", ".3f"),
        ("cut off by a limit", "truncated_fraction", ".3f"),
        ("trajectories", "played", "d"),
        ("failed (in no number)", "failed", "d"),
    ):
        rows.append((label, format(means[key], form), ""))
    panel = result["panel"]
    return [*rows, ("games", str(panel["prompts"]), ""), ("panel sha256", panel["sha256"][:16], "")]


def _row(name: str, estimate: Mapping[str, Any]) -> tuple[str, str, str]:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    return (
        name,
        "unknown" if value is None else f"{value:.3f}",
        "" if low is None else f"{low:.3f} to {high:.3f}",
    )
