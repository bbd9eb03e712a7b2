"""Trajectories that are whole and not yet trained on, as two files of a checkpoint.

``sets.json`` has all but the tokens, ``sets.safetensors`` those: the observation tokens, action
tokens and log-probs of all turns one after the other, in the order of the turns. Prompts are not
kept: the cursor has their positions, and a position always gives the same prompt. Where it does not
any more, a group's name, which has its prompt's id, tells.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megatron_spear.errors import CheckpointError
from megatron_spear.rollout.rollouter import is_named_after
from megatron_spear.types import (
    Prompt,
    Segment,
    Status,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    TrajectoryId,
    Turn,
    VersionSpan,
)

SETS_FILE = "sets.json"
TOKENS_FILE = "sets.safetensors"

_ARRAYS = {
    "observation_tokens": np.int32,
    "action_tokens": np.int32,
    "action_logprobs": np.float32,
}
_PLAIN_OF_TURN = tuple(
    field.name for field in fields(Turn) if field.name not in (*_ARRAYS, "versions", "tool_calls")
)
_PLAIN_OF_TRAJECTORY = ("status", "env_reward", "won", "info")

Sets = Mapping[int, Sequence[TrajectoryGroup]]


def write_sets(folder: Path, sets: Sets) -> None:
    """Write the groups of each step; nothing where there are none. Raises OSError."""
    if not sets:
        return
    turns = [
        turn
        for groups in sets.values()
        for group in groups
        for trajectory in (*group.members, *group.failures)
        for turn in trajectory.turns
    ]
    tokens = {
        name: np.concatenate([np.zeros(0, kind), *(getattr(turn, name) for turn in turns)])
        for name, kind in _ARRAYS.items()
    }
    save_file(tokens, folder / TOKENS_FILE)
    tree = {str(step): [_group_tree(group) for group in groups] for step, groups in sets.items()}
    (folder / SETS_FILE).write_text(json.dumps(tree), encoding="utf-8")


def read_sets(
    folder: Path, prompts_of: Callable[[int], Sequence[Prompt]]
) -> dict[int, list[TrajectoryGroup]]:
    """What ``write_sets`` wrote, {} where it wrote nothing; ``prompts_of(step)`` are the prompts of
    its groups.

    Raises CheckpointError where the two do not go together, by their number or by their ids.
    """
    if not (folder / SETS_FILE).is_file():
        return {}
    try:
        tree = json.loads((folder / SETS_FILE).read_text(encoding="utf-8"))
        tokens = _Tokens(load_file(folder / TOKENS_FILE))
        found = {
            int(step): [
                _group(group, prompt, tokens)
                for group, prompt in zip(groups, prompts_of(int(step)), strict=True)
            ]
            for step, groups in tree.items()
        }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / SETS_FILE} does not fit its checkpoint: {error}"
        ) from error
    tokens.require_used_up(folder / TOKENS_FILE)
    return found


def _group_tree(group: TrajectoryGroup) -> dict[str, Any]:
    return {
        "group_id": group.group_id,
        "members": [_trajectory_tree(trajectory) for trajectory in group.members],
        "failures": [_trajectory_tree(trajectory) for trajectory in group.failures],
    }


def _trajectory_tree(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "id": asdict(trajectory.id),
        **{name: getattr(trajectory, name) for name in _PLAIN_OF_TRAJECTORY},
        "segments": [[_turn_tree(turn) for turn in s.turns] for s in trajectory.segments],
    }


def _turn_tree(turn: Turn) -> dict[str, Any]:
    return {
        **{name: getattr(turn, name) for name in _PLAIN_OF_TURN},
        "sizes": [len(getattr(turn, name)) for name in _ARRAYS],
        "versions": [list(span) for span in turn.versions],
        "tool_calls": [asdict(call) for call in turn.tool_calls],
    }


class _Tokens:
    """The arrays of all turns, given out in order."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = {name: arrays[name] for name in _ARRAYS}
        self._used = dict.fromkeys(_ARRAYS, 0)

    def next(self, sizes: Sequence[int]) -> dict[str, Any]:
        """The arrays of the next turn, of these sizes."""
        found: dict[str, Any] = {}
        for name, size in zip(_ARRAYS, sizes, strict=True):
            start = self._used[name]
            found[name] = self._arrays[name][start : start + size]
            self._used[name] += size
            if len(found[name]) != size:
                raise ValueError(f"{TOKENS_FILE} has too few {name}")
        return found

    def require_used_up(self, file: Path) -> None:
        """CheckpointError if there are tokens of no turn."""
        for name, array in self._arrays.items():
            if len(array) != self._used[name]:
                raise CheckpointError(
                    f"{file} has {len(array)} {name}, expected {self._used[name]}"
                )


def _group(tree: Mapping[str, Any], prompt: Prompt, tokens: _Tokens) -> TrajectoryGroup:
    if not is_named_after(tree["group_id"], prompt):
        raise ValueError(
            f"group {tree['group_id']} was not played with the prompt that is now in its place, "
            f"{prompt.prompt_id}"
        )

    def played(name: str) -> tuple[Trajectory, ...]:
        return tuple(_trajectory(trajectory, prompt, tokens) for trajectory in tree[name])

    members, failures = played("members"), played("failures")
    return TrajectoryGroup(
        group_id=tree["group_id"], prompt=prompt, members=members, failures=failures
    )


def _trajectory(tree: Mapping[str, Any], prompt: Prompt, tokens: _Tokens) -> Trajectory:
    plain = {name: tree[name] for name in _PLAIN_OF_TRAJECTORY}
    return Trajectory(
        id=TrajectoryId(**tree["id"]),
        prompt=prompt,
        segments=tuple(
            Segment(turns=tuple(_turn(turn, tokens) for turn in turns))
            for turns in tree["segments"]
        ),
        **{**plain, "status": Status(plain["status"])},
    )


def _turn(tree: Mapping[str, Any], tokens: _Tokens) -> Turn:
    return Turn(
        **{name: tree[name] for name in _PLAIN_OF_TURN},
        **tokens.next(tree["sizes"]),
        versions=tuple(VersionSpan(*span) for span in tree["versions"]),
        tool_calls=tuple(ToolCall(**call) for call in tree["tool_calls"]),
    )
