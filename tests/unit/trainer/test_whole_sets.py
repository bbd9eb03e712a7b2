"""Sets that are whole and not yet trained on: what is read is what was written, to the last bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_spear.errors import CheckpointError
from megatron_spear.rollout.rollouter import is_named_after
from megatron_spear.testing.hand_made import make_prompt
from megatron_spear.trainer.whole_sets import SETS_FILE, TOKENS_FILE, read_sets, write_sets
from megatron_spear.types import (
    Segment,
    Status,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    TrajectoryId,
    Turn,
    VersionSpan,
)

_TEXT = st.text(max_size=8)
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def _turns(draw: st.DrawFn) -> Turn:
    actions = draw(st.lists(st.integers(0, 2**31 - 1), max_size=4))
    first = draw(st.integers(0, len(actions)))
    return Turn(
        observation_tokens=np.array(draw(st.lists(st.integers(0, 99), max_size=4)), np.int32),
        action_tokens=np.array(actions, np.int32),
        action_logprobs=np.array([draw(st.floats(-9, 0, width=32)) for _ in actions], np.float32),
        finish_reason=draw(_TEXT),
        versions=(VersionSpan(3, first), VersionSpan(4, len(actions) - first)),
        time_s=draw(_FLOATS),
        text=draw(_TEXT),
        action_text=draw(_TEXT),
        valid=draw(st.booleans()),
        void=draw(st.booleans()),
        tool_calls=tuple(
            ToolCall(name=name, arguments="{}", succeeded=draw(st.booleans()))
            for name in draw(st.lists(_TEXT, max_size=2))
        ),
        anchor=draw(_TEXT),
    )


@st.composite
def _trajectories(draw: st.DrawFn, number: int, member: int, status: Status) -> Trajectory:
    segments = draw(st.lists(st.lists(_turns(), max_size=2), max_size=2))
    return Trajectory(
        id=TrajectoryId(group=f"7.1/prompt-{number}", member=member),
        prompt=make_prompt(str(number)),
        segments=tuple(Segment(turns=tuple(turns)) for turns in segments),
        status=status,
        env_reward=draw(_FLOATS),
        won=draw(st.booleans()),
        info={"error": draw(_TEXT), "score": draw(_FLOATS)},
    )


@st.composite
def _groups(draw: st.DrawFn, number: int) -> TrajectoryGroup:
    return TrajectoryGroup(
        group_id=f"7.1/prompt-{number}",
        prompt=make_prompt(str(number)),
        members=tuple(draw(_trajectories(number, m, Status.COMPLETED)) for m in range(2)),
        failures=tuple(draw(_trajectories(number, m, Status.FAILED_TOOL)) for m in (2,)),
    )


def _plain(value: Any) -> Any:
    """A record as lists and values that can be compared; arrays with their dtype."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _prompts_of(step: int) -> list[Any]:
    return [make_prompt(str(2 * step)), make_prompt(str(2 * step + 1))]


def _sets() -> st.SearchStrategy[dict[int, list[TrajectoryGroup]]]:
    return st.fixed_dictionaries(
        {step: st.tuples(_groups(2 * step), _groups(2 * step + 1)).map(list) for step in (5, 6)}
    )


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(sets=_sets())
def test_what_is_read_is_what_was_written(
    tmp_path: Path, sets: dict[int, list[TrajectoryGroup]]
) -> None:
    write_sets(tmp_path, sets)
    found = read_sets(tmp_path, _prompts_of)
    assert {s: _plain(g) for s, g in found.items()} == {s: _plain(g) for s, g in sets.items()}


def test_without_sets_there_are_no_files(tmp_path: Path) -> None:
    write_sets(tmp_path, {})
    assert not any(tmp_path.iterdir())
    assert read_sets(tmp_path, _prompts_of) == {}


def _one_set(folder: Path) -> None:
    turn = Turn(
        observation_tokens=np.array([1, 2], np.int32),
        action_tokens=np.array([3], np.int32),
        action_logprobs=np.array([-0.5], np.float32),
        finish_reason="stop",
        versions=(VersionSpan(0, 1),),
    )
    group = TrajectoryGroup(
        group_id="7.1/prompt-10",
        prompt=make_prompt("10"),
        members=(
            Trajectory(
                id=TrajectoryId(group="7.1/prompt-10", member=0),
                prompt=make_prompt("10"),
                segments=(Segment(turns=(turn,)),),
                status=Status.COMPLETED,
            ),
        ),
    )
    other = replace(group, group_id="7.1/prompt-11", prompt=make_prompt("11"))
    write_sets(folder, {5: [group, other]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["5"].pop(), "longer"),
        (lambda tree: tree["5"][1]["members"].clear(), "has 4 observation_tokens, expected 2"),
        (lambda tree: tree["5"][0]["members"][0].pop("status"), "status"),
        (lambda tree: tree["5"][1]["members"][0]["segments"][0][0].update(sizes=[2, 9, 1]), "few"),
    ],
)
def test_files_that_do_not_go_together_are_told(tmp_path: Path, change: Any, words: str) -> None:
    _one_set(tmp_path)
    tree = json.loads((tmp_path / SETS_FILE).read_text())
    change(tree)
    (tmp_path / SETS_FILE).write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=words):
        read_sets(tmp_path, _prompts_of)


@pytest.mark.parametrize("places", [(11, 10), (10, 1), (10, 111)])
def test_a_set_of_another_prompt_is_refused(tmp_path: Path, places: tuple[int, int]) -> None:
    _one_set(tmp_path)
    with pytest.raises(CheckpointError, match=r"group 7\.1/prompt-1\d was not played with the"):
        read_sets(tmp_path, lambda step: [make_prompt(str(place)) for place in places])


def test_a_prompt_that_came_twice_in_a_step_has_two_groups() -> None:
    prompt = make_prompt("1#1")
    for name in ("prompt-1#1", "prompt-1#1#1", "prompt-1#1#12"):
        assert is_named_after(f"7.1/{name}", prompt)
    for name in ("prompt-1", "prompt-1#2", "prompt-1#1#", "prompt-1#1#b", "prompt-1#11"):
        assert not is_named_after(f"7.1/{name}", prompt)


def test_a_missing_file_of_tokens_is_told(tmp_path: Path) -> None:
    _one_set(tmp_path)
    (tmp_path / TOKENS_FILE).unlink()
    with pytest.raises(CheckpointError, match=SETS_FILE):
        read_sets(tmp_path, _prompts_of)
