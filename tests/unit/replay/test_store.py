"""The store: round trip, FIFO, taken once, exact resume, and damage that is named."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.errors import CheckpointError
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import Reward, TrainSample


def _trajectory(member: int, **changes: Any) -> list[TrainSample]:
    return [make_sample(member=member, **changes)]


def _members(store: ReplayStore) -> list[int]:
    return [row.trajectory_id.member for row in store.candidates()]


def _saved(store: ReplayStore) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    return json.loads(json.dumps(store.state_dict()))


def _assert_same(first: TrainSample, second: TrainSample) -> None:
    for field in fields(TrainSample):
        left, right = getattr(first, field.name), getattr(second, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right, field.name


def test_round_trip_is_exact(tmp_path: Path) -> None:
    reward = Reward(outcome=1.0, intrinsic=0.1 + 0.2, format=-0.1, parts={"won": 1.0})
    long = [
        make_sample(member=3, segment=i, num_segments=2, reward=reward, policy_version=5 - i)
        for i in range(2)
    ]
    strange = make_sample(
        "gröup/1", mask=[0, 1], anchors=("a ☃", ""), turn_starts=np.array([1, 2], np.int32)
    )
    store = ReplayStore(tmp_path, 10)
    store.add([long, [strange]])
    row = store.candidates()[0]
    assert (row.policy_version, row.reward) == (4, reward)
    taken = store.take([1, 0])
    for got, put in zip([*taken[1], *taken[0]], [*long, strange], strict=True):
        _assert_same(got, put)


def test_fifo_by_capacity(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 3)
    assert store.add([_trajectory(0), _trajectory(1)]) == 0
    assert store.add([_trajectory(2), _trajectory(3)]) == 1
    assert _members(store) == [1, 2, 3]
    assert store.add([_trajectory(i) for i in range(4, 9)]) == 5
    assert _members(store) == [6, 7, 8]


def test_taken_once(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 5)
    store.add([_trajectory(0), _trajectory(1)])
    store.take([0])
    assert _members(store) == [1]
    with pytest.raises(KeyError):
        store.take([0])


def test_eviction_by_age(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 5)
    store.add([_trajectory(0, policy_version=3), _trajectory(1, policy_version=4)])
    assert store.evict_older_than(4) == 1
    assert _members(store) == [1]


def test_an_add_costs_only_its_own_rows(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 100)
    store.add([_trajectory(i) for i in range(50)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    store.add([_trajectory(50)])
    new = set(tmp_path.iterdir()) - set(before)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    (only,) = new
    assert only.stat().st_size < next(iter(before)).stat().st_size / 40
    store.add([])
    assert len(list(tmp_path.iterdir())) == 2


def test_state_is_a_position_not_a_copy(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(i, mask=[0] + [1] * 5000) for i in range(4)])
    assert len(json.dumps(store.state_dict())) < 300


def test_resume_sees_what_was_stored(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(i) for i in range(3)])
    store.add([_trajectory(i) for i in range(3, 5)])
    store.take([1, 3])
    resumed = ReplayStore(tmp_path, 10)
    resumed.load_state_dict(_saved(store))
    assert resumed.candidates() == store.candidates()
    resumed.add([_trajectory(9)])
    store.add([_trajectory(9)])
    assert resumed.candidates() == store.candidates()
    assert resumed.state_dict() == store.state_dict()


def test_an_earlier_checkpoint_does_not_see_later_rows(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(0)])
    early = _saved(store)
    store.add([_trajectory(1)])
    store.take([0])
    late = _saved(store)
    resumed = ReplayStore(tmp_path, 10)
    resumed.load_state_dict(early)
    assert _members(resumed) == [0]
    resumed.add([_trajectory(7, mask=[0, 1, 1, 1])])
    assert _members(resumed) == [0, 7]
    assert resumed.take([1])[0][0].trajectory_id.member == 7
    with pytest.raises(CheckpointError, match="overwritten by another run"):
        ReplayStore(tmp_path, 10).load_state_dict(late)


@pytest.mark.parametrize("cut", [1, 20, 400])
def test_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(0), _trajectory(1)])
    path = tmp_path / "segment-00000000.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=r"segment-00000000\.bin.*truncated"):
        ReplayStore(tmp_path, 10).load_state_dict(_saved(store))
    with pytest.raises(CheckpointError, match=r"segment-00000000\.bin"):
        store.take([1])


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(0)])
    path = tmp_path / "segment-00000000.bin"
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"segment-00000000\.bin"):
            ReplayStore(tmp_path, 10).load_state_dict(_saved(store))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"segment-00000000\.bin.*corrupt"):
        store.take([0])


def test_missing_file_and_strict_keys(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(0)])
    state = _saved(store)
    with pytest.raises(CheckpointError, match=r"unknown \['more'\]"):
        store.load_state_dict(state | {"more": 1})
    with pytest.raises(CheckpointError, match=r"missing \['rows'\]"):
        store.load_state_dict({k: v for k, v in state.items() if k != "rows"})
    with pytest.raises(CheckpointError, match="rows \\[77\\]"):
        store.load_state_dict(state | {"rows": [0, 77]})
    (tmp_path / "segment-00000000.bin").unlink()
    with pytest.raises(CheckpointError, match=r"segment-00000000\.bin: missing"):
        store.load_state_dict(state)


def test_resume_with_a_smaller_capacity_keeps_the_newest(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(i) for i in range(4)])
    smaller = ReplayStore(tmp_path, 2)
    smaller.load_state_dict(_saved(store))
    assert _members(smaller) == [2, 3]


def test_prune_keeps_what_checkpoints_need(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 1)
    store.add([_trajectory(0)])
    checkpoint = _saved(store)
    store.add([_trajectory(1)])
    store.add([_trajectory(2)])
    assert store.prune([checkpoint]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "segment-00000000.bin",
        "segment-00000002.bin",
    ]
    ReplayStore(tmp_path, 1).load_state_dict(checkpoint)
    assert store.prune([]) == 1
