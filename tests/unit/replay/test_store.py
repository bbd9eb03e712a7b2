"""The store: round trip, FIFO, taken once, exact resume, and damage that is named."""

import errno
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.errors import CheckpointError
from megatron_spear.replay import store as store_module
from megatron_spear.replay.index import key_of
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import Reward, TrainSample


def _trajectory(member: int, **changes: Any) -> list[TrainSample]:
    return [make_sample(member=member, **changes)]


def _members(store: ReplayStore) -> list[int]:
    by_key = {key_of(f"g/{member}"): member for member in range(100)}
    return [by_key[key] for key in store.index().trajectory_keys.tolist()]


def _same_index(first: ReplayStore, second: ReplayStore) -> bool:
    left, right = first.index(), second.index()
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in left.__slots__)


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
    taken = store.take([1, 0])
    for got, put in zip([*taken[1], *taken[0]], [*long, strange], strict=True):
        _assert_same(got, put)
    for sample in [*taken[0], *taken[1]]:
        for name in ("token_ids", "old_logprobs", "turn_starts"):
            array = getattr(sample, name)
            assert array.flags.aligned and not array.flags.writeable, name


def test_hundreds_of_segments(tmp_path: Path) -> None:
    """More pieces than the system takes in one call."""
    long = [make_sample(segment=i, num_segments=300, mask=[0] + [1] * i) for i in range(300)]
    store = ReplayStore(tmp_path, 10)
    store.add([long, _trajectory(1), long])
    for row in (2, 0):
        for got, put in zip(store.take([row])[0], long, strict=True):
            _assert_same(got, put)


def test_index_by_hand(tmp_path: Path) -> None:
    reward = Reward(outcome=1.0, intrinsic=0.1 + 0.2, format=-0.1)
    parts = [
        make_sample(advantage=advantage, mask=mask, reward=reward, policy_version=version)
        for advantage, mask, version in [(0.25, (0, 1, 1), 5), (1.0, (0, 1), 4)]
    ]
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(7, mask=(0, 0)), parts])
    index = store.index()
    assert index.row_ids.tolist() == [0, 1]
    assert index.policy_versions.tolist() == [0, 4]
    assert index.outcome.tolist() == [1.0, 1.0] and index.format.tolist() == [0.0, -0.1]
    assert index.intrinsic.tolist() == [0.0, 0.1 + 0.2]
    assert index.advantages.tolist() == [0.0, 0.5], "(0.25 + 0.25 + 1) / 3; none is masked in 0"
    assert index.num_tokens.tolist() == [2, 5]
    assert index.prompt_keys.tolist() == [key_of("prompt-g")] * 2
    assert index.trajectory_keys.tolist() == [key_of("g/7"), key_of("g/0")]
    assert key_of("g/7") == 5206779584170061565, "blake2b of 8 bytes, little endian: kept in files"


def test_no_limit(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, None)
    assert store.add([_trajectory(i) for i in range(30)]) == 0
    assert len(store) == 30


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
    with pytest.raises(KeyError, match=r"rows \[0, 2\] are not stored"):
        store.take([0, 1, 2])
    with pytest.raises(KeyError, match="twice"):
        store.discard([1, 1])
    assert _members(store) == [1]
    assert store.discard(np.array([1])) == 1
    assert store.take([]) == [] and len(store) == 0


def test_what_is_read_stays(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 5)
    store.add([_trajectory(0), _trajectory(1)])
    for _ in range(2):
        ((sample,),) = store.read([1])
        _assert_same(sample, _trajectory(1)[0])
    assert _members(store) == [0, 1]
    with pytest.raises(KeyError, match=r"rows \[2\] are not stored"):
        store.read([2])


def test_what_was_taken_outlives_its_file(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 5)
    put = make_sample(mask=[0] + [1] * 3000)
    store.add([[put]])
    path = tmp_path / "segment-00000000.bin"
    ((taken,),) = store.take([0])
    path.write_bytes(b"x" * path.stat().st_size)
    _assert_same(taken, put)
    assert store.prune([]) == 1
    _assert_same(taken, put)


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


def test_state_takes_a_bit_a_row(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, None)
    for first in (0, 1500):
        store.add([_trajectory(i) for i in range(first, first + 1500)])
    store.discard(np.random.default_rng(0).permutation(3000)[:1499])
    state = _saved(store)
    assert len(json.dumps(state)) < 3000 / 6 + 400
    resumed = ReplayStore(tmp_path, None)
    resumed.load_state_dict(state)
    assert len(resumed) == 1501 and _same_index(resumed, store)


def test_what_a_state_names_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")))
    )
    folder = tmp_path / "replay"
    store = ReplayStore(folder, None)
    for member in range(3):
        store.add([_trajectory(member)])
    store.take([1])
    assert synced == [], "adding waits for no disk"
    store.state_dict()
    files = [folder / f"segment-0000000{number}.bin" for number in (0, 2)]
    assert synced == [*files, folder, tmp_path]
    store.state_dict()
    store.take([0, 2])
    store.add([_trajectory(3)])
    assert len(synced) == 4
    store.state_dict()
    assert synced[4:] == [folder / "segment-00000003.bin", folder, tmp_path]
    ReplayStore(folder, None).load_state_dict(store.state_dict())
    assert len(synced) == 7


def test_a_full_disk_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(0)])
    before = _saved(store)
    writev = os.writev

    def some(descriptor: int, pieces: list[memoryview]) -> int:
        return os.write(descriptor, b"".join(pieces)[:100])

    def full(descriptor: int, pieces: list[memoryview]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    many = [_trajectory(i) for i in range(200)]
    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="No space left"):
        store.add(many)
    assert _saved(store) == before and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "writev", some)
    store.add(many)
    written = (tmp_path / "segment-00000001.bin").read_bytes()
    monkeypatch.setattr(os, "writev", writev)
    again = ReplayStore(tmp_path / "again", 10)
    again.load_state_dict({**before, "files": []})
    again.add(many)
    assert (tmp_path / "again" / "segment-00000001.bin").read_bytes() == written


def test_resume_sees_what_was_stored(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(i) for i in range(3)])
    store.add([_trajectory(i) for i in range(3, 5)])
    store.take([1, 3])
    resumed = ReplayStore(tmp_path, 10)
    resumed.load_state_dict(_saved(store))
    assert _members(resumed) == [0, 2, 4] and _same_index(resumed, store)
    resumed.add([_trajectory(9)])
    store.add([_trajectory(9)])
    assert _members(resumed) == [0, 2, 4, 9] and _same_index(resumed, store)
    assert resumed.state_dict() == store.state_dict()


def test_resume_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(i) for i in range(3)])
    monkeypatch.setattr(store_module, "decode", None)
    resumed = ReplayStore(tmp_path, 10)
    resumed.load_state_dict(_saved(store))
    assert _same_index(resumed, store)
    with pytest.raises(TypeError):
        resumed.take([0])


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
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(CheckpointError, match=r"segment-00000000\.bin.*corrupt"):
        store.take([0])
    assert len(store) == 1
    path.write_bytes(content)
    assert len(store.take([0])) == 1, "a failed take has released nothing"


def test_only_live_rows_must_be_whole(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(0), _trajectory(1)])
    path = tmp_path / "segment-00000000.bin"
    content = path.read_bytes()
    resumed = ReplayStore(tmp_path, 10)
    resumed.add([_trajectory(5)])
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(CheckpointError, match="byte 8 is corrupt"):
        resumed.load_state_dict(_saved(store))
    assert _members(resumed) == [5], "what cannot be loaded changes nothing"
    store.discard([0])
    resumed.load_state_dict(_saved(store))
    assert _members(resumed) == [1]


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(0)])
    path = tmp_path / "segment-00000000.bin"
    path.write_bytes(b"MSREPL01" + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"segment-00000000\.bin: not a replay segment of t"):
        ReplayStore(tmp_path, 10).load_state_dict(_saved(store))


def test_missing_file_and_strict_keys(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, 10)
    store.add([_trajectory(0)])
    state = _saved(store)
    with pytest.raises(CheckpointError, match=r"unknown \['more'\]"):
        store.load_state_dict(state | {"more": 1})
    with pytest.raises(CheckpointError, match=r"missing \['files'\]"):
        store.load_state_dict({k: v for k, v in state.items() if k != "files"})
    (file,) = state["files"]
    assert file["live"] == "gA==", "a bit a row, the first is the highest of its byte"
    with pytest.raises(CheckpointError, match=r"segment-00000000\.bin.*rows \[2, 9\]"):
        store.load_state_dict(state | {"files": [file | {"live": "oEA="}]})
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
    (tmp_path / "segment-00000003.bin.tmp").write_bytes(b"left by a kill")
    assert store.prune([]) == 2
    assert _members(store) == [2] and len(store.take([2])) == 1
