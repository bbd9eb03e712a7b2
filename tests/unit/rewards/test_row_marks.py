"""Which rows of trajectories are marked, by hand, and what holds for any row."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.config.method import RowFiltersSection
from megatron_spear.rewards.row_marks import RowMarks, mark_rows, row_marks, used_up_budget
from megatron_spear.testing.hand_made import make_prompt, make_trajectory, make_turn
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory, Status, Trajectory, Turn

ALL = RowFiltersSection()
CLEAN = make_turn()
GARBLED = make_turn(num_tokens=29, action_tokens=np.full(29, 7, np.int32))
BAD = {
    "overlong": make_turn(finish_reason="context"),
    "void": make_turn(text="", void=True),
    "repetitive": GARBLED,
    "unreadable": make_turn(text="go to \ufffd"),
}


def _group(*trajectories: Trajectory) -> ScoredGroup:
    members = tuple(
        ScoredTrajectory(trajectory=t, reward=Reward(outcome=0.0)) for t in trajectories
    )
    return ScoredGroup(group_id="g", prompt=make_prompt("g"), members=members)


@pytest.mark.parametrize("name", BAD)
def test_each_mark_has_its_switch(name: str) -> None:
    trajectory = make_trajectory("g", 0, [[CLEAN, BAD[name]]])
    (segment,) = trajectory.segments
    none = dict.fromkeys(RowMarks.__dataclass_fields__, False)
    assert row_marks(trajectory, segment, ALL) == RowMarks(**(none | {name: True}))
    off = ALL.model_copy(update={name: False})
    assert row_marks(trajectory, segment, off) == RowMarks(**none)


def test_a_row_is_a_segment_and_every_row_is_counted_once_a_mark() -> None:
    both = make_turn(text="\ufffd", void=True)
    window = make_trajectory("g", 0, [[CLEAN], [BAD["void"]], [both]])
    full = make_trajectory("g", 1, [[CLEAN, BAD["void"], CLEAN]])
    marked, metrics = mark_rows([_group(window, full, make_trajectory("g", 2))], ALL)
    assert marked == {(window.id, 1), (window.id, 2), (full.id, 0)}
    assert metrics == {
        "filter/overlong_rows": 0,
        "filter/void_rows": 3,
        "filter/repetitive_rows": 0,
        "filter/unreadable_rows": 1,
        "filter/marked_fraction": 3 / 5,
    }


@pytest.mark.parametrize(
    ("segments", "status", "expected"),
    [
        # An answer of a row of its own that filled rollout.max_new_tokens.
        ([["stop"], ["length"], ["stop"]], Status.COMPLETED, [False, True, False]),
        # A conversation goes on after a long answer, and may end with one.
        ([["stop", "length", "stop"]], Status.COMPLETED, [False]),
        ([["stop", "length"]], Status.TRUNCATED_TURNS, [False]),
        # The context cut the last answer, or left less room than an answer may take.
        ([["stop", "context"]], Status.TRUNCATED_LENGTH, [True]),
        ([["stop", "length"]], Status.TRUNCATED_LENGTH, [True]),
        # The next prompt found no room in the conversation.
        ([["stop", "stop"]], Status.TRUNCATED_LENGTH, [True]),
        # With a window the rows before the cut one did not use theirs up.
        ([["stop"], ["stop"], ["context"]], Status.TRUNCATED_LENGTH, [False, False, True]),
        ([["stop"], ["stop"]], Status.TRUNCATED_LENGTH, [False, False]),
        # A conversation that has branched, and one that goes on to an end of its own.
        ([["stop", "stop"], ["stop", "stop"]], Status.TRUNCATED_LENGTH, [False, True]),
        ([["stop", "stop"], ["stop", "stop"]], Status.COMPLETED, [False, False]),
    ],
)
def test_what_used_up_its_token_budget(
    segments: list[list[str]], status: Status, expected: list[bool]
) -> None:
    turns = [[make_turn(finish_reason=reason) for reason in reasons] for reasons in segments]
    trajectory = make_trajectory("g", 0, turns, status=status)
    assert [used_up_budget(trajectory, s) for s in trajectory.segments] == expected


def test_the_same_short_action_again_is_not_garbled() -> None:
    turns = [make_turn(num_tokens=10) for _ in range(40)]
    trajectory = make_trajectory("g", 0, [turns])
    assert not row_marks(trajectory, trajectory.segments[0], ALL).repetitive


def test_nothing_to_mark() -> None:
    marked, metrics = mark_rows([_group()], ALL)
    assert marked == frozenset() and "filter/marked_fraction" not in metrics
    silent = make_trajectory("g", 0, [[make_turn(num_tokens=0)]])
    assert mark_rows([_group(silent)], ALL)[0] == frozenset(), "no tokens are no garbled tokens"


_TURNS = st.builds(
    make_turn,
    num_tokens=st.sampled_from([0, 1, 40]),
    finish_reason=st.sampled_from(["stop", "length", "context"]),
    text=st.sampled_from(["", "look", "caf\u00c3\u00a9"]),
    void=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(_TURNS, min_size=1, max_size=3), min_size=1, max_size=3), max_size=3
    ),
    st.sampled_from([Status.COMPLETED, Status.TRUNCATED_LENGTH]),
    st.fixed_dictionaries({name: st.booleans() for name in BAD}),
)
def test_marks_of_any_rows(
    members: list[list[list[Turn]]], status: Status, switches: dict[str, bool]
) -> None:
    """A row's marks depend on its own turns and its trajectory's end alone; off marks nothing."""
    section = RowFiltersSection(**switches)
    trajectories = [make_trajectory("g", i, m, status=status) for i, m in enumerate(members)]
    marked, metrics = mark_rows([_group(*trajectories)], section)
    assert mark_rows([_group(t) for t in trajectories[::-1]], section) == (marked, metrics)
    rows = [(t, s) for t in trajectories for s in t.segments]
    assert metrics.get("filter/marked_fraction", 0.0) == len(marked) / max(len(rows), 1)
    for name, on in switches.items():
        found = [getattr(row_marks(t, s, ALL), name) for t, s in rows]
        assert metrics[f"filter/{name}_rows"] == (sum(found) if on else 0)


def test_marks_do_not_read_rewards() -> None:
    group = _group(make_trajectory("g", 0, [[BAD["void"]]]), make_trajectory("g", 1))
    marked, _ = mark_rows([group], ALL)
    for outcome in (1e6, -1e6, float("nan")):
        members = tuple(replace(m, reward=Reward(outcome=outcome)) for m in group.members)
        assert mark_rows([replace(group, members=members)], ALL)[0] == marked
