"""What people are told of a replay folder: which rows are live, and each fault by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.errors import CheckpointError, DataError
from megatron_spear.replay.contents import read_contents
from megatron_spear.replay.contents_text import overview, printable, row_text
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import Reward


def _store(folder: Path) -> ReplayStore:
    """Files of rows 0 to 2, 3 and 4 to 5; row 4 has two segments. All of the second, and the first
    row, are taken."""
    store = ReplayStore(folder, 10)
    store.add([[make_sample("a", i, policy_version=1)] for i in range(3)])
    store.add([[make_sample("a", 3, policy_version=2)]])
    pair = [make_sample("b", 0, segment=i, num_segments=2, policy_version=3) for i in range(2)]
    store.add([pair, [make_sample("b", 1, policy_version=3, reward=Reward(outcome=0.5))]])
    store.take([0, 3])
    return store


def _saved(store: ReplayStore) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(store.state_dict()))
    return state


def _text(contents: Any, **options: Any) -> str:
    return "\n".join(overview(contents, **{"policy_version": 5, "top": 3, **options}))


def test_a_checkpoint_says_which_rows_are_live(tmp_path: Path) -> None:
    store = _store(tmp_path)
    state = _saved(store)
    assert read_contents(tmp_path, state).rows["row_ids"].tolist() == [1, 2, 4, 5]
    store.add([[make_sample("c", 0, policy_version=4)]])  # after the checkpoint
    contents = read_contents(tmp_path, state)
    assert contents.rows["row_ids"].tolist() == [1, 2, 4, 5, 6]
    assert (contents.num_written, len(contents.files), contents.faults) == (7, 4, ())
    assert contents.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert read_contents(tmp_path).rows["row_ids"].tolist() == list(range(7)), "none says so"
    facts = contents.facts()
    assert [fact.prompt_id for fact in facts] == [f"prompt-{group}" for group in "aabbc"]
    assert [fact.num_segments for fact in facts] == [1, 1, 2, 1, 1]
    assert contents.samples(0)[0].trajectory_id.member == 0, "spent rows can still be read"
    with pytest.raises(DataError, match="no row 7; its files hold rows 0 to 6"):
        contents.samples(7)


def test_the_overview_by_hand(tmp_path: Path) -> None:
    text = _text(read_contents(tmp_path, _saved(_store(tmp_path))))
    rows = {line.split("  ")[0]: line.split()[-4:] for line in text.splitlines()}
    assert rows["age (policy versions)"] == ["2", "3", "3", "4"]
    assert rows["reward: outcome"] == ["0.5", "1", "0.875", "1"]
    assert rows["tokens"] == ["3", "3", "3.75", "6"]
    assert rows["segments"] == ["1", "1", "1.25", "2"]
    assert "4 rows" in text and "6 rows written" in text and "checksums all hold" in text
    assert "     2  outcome 0.75  prompt-b" in text and "     2  outcome 1  prompt-a" in text


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_each_damage_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    state = _saved(_store(tmp_path))
    first, _, third = sorted(tmp_path.iterdir())
    contents = read_contents(tmp_path)
    _flip(first, int(contents.files[0].rows["offsets"][1]) + 40)
    _flip(third, third.stat().st_size - 30)
    contents = read_contents(tmp_path, state)
    assert contents.rows["row_ids"].tolist() == [2]
    assert len(contents.faults) == 2
    assert contents.faults[0].startswith("row 1: segment-00000000.bin: the replay record at byte")
    assert "segment-00000002.bin: the index is corrupt" in contents.faults[1]
    text = _text(contents)
    assert "checksums all hold" not in text and text.count("DAMAGED") == 2
    with pytest.raises(CheckpointError, match="is corrupt"):
        contents.samples(1)


@pytest.mark.parametrize(
    ("length", "told"),
    [(0, "empty"), (5, "got 5 bytes"), (10, "got 10 bytes"), (100, "got 100 bytes")],
)
def test_files_that_were_cut_off(tmp_path: Path, length: int, told: str) -> None:
    state = _saved(_store(tmp_path))
    path = min(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:length])
    (fault,) = read_contents(tmp_path, state).faults
    assert fault.startswith("segment-00000000.bin") and told in fault
    (fault,) = read_contents(tmp_path).faults  # no checkpoint says how long it was
    alone = {0: "empty", 5: "not a replay segment", 10: "cut off after 10 bytes"}
    assert alone.get(length, "the index is corrupt") in fault


def test_a_missing_file_counts_where_the_checkpoint_needs_it(tmp_path: Path) -> None:
    state = _saved(_store(tmp_path))
    first, second, _ = sorted(tmp_path.iterdir())
    second.unlink()  # its only row is spent
    assert read_contents(tmp_path, state).faults == ()
    first.unlink()
    contents = read_contents(tmp_path, state)
    assert contents.missing == ("segment-00000000.bin",)
    assert contents.rows["row_ids"].tolist() == [4, 5]
    assert "missing, but the checkpoint needs rows of it" in contents.faults[0]


def test_another_runs_file_in_its_place(tmp_path: Path) -> None:
    state = _saved(_store(tmp_path / "one"))
    other = ReplayStore(tmp_path / "two", 10)
    other.add([[make_sample("x", i)] for i in range(3)])
    path = min((tmp_path / "one").iterdir())
    path.write_bytes((tmp_path / "two" / path.name).read_bytes())
    (fault,) = read_contents(tmp_path / "one", state).faults
    assert "overwritten by another run" in fault


def test_an_empty_store(tmp_path: Path) -> None:
    contents = read_contents(tmp_path, _saved(ReplayStore(tmp_path, 10)))
    assert "0 rows" in _text(contents, policy_version=None) and not contents.faults
    with pytest.raises(DataError, match="hold rows none"):
        contents.samples(0)


def test_a_row_as_text_by_hand(tmp_path: Path) -> None:
    sample = make_sample(
        mask=[0, 0, 1, 1, 0, 1, 0],
        turn_starts=np.array([2, 5], np.int32),
        reward=Reward(outcome=1.0, intrinsic=0.25, format=-0.5, parts={"won": 1.0}),
        policy_version=4,
        tool_calls=2,
    )
    lines = row_text(17, [sample], lambda ids: " ".join(f"w{i}" for i in ids))
    assert lines[0] == "row 17: prompt prompt-g, group g, attempt 0"
    assert "outcome 1, intrinsic 0.25 (before mu), format -0.5" in lines[2]
    body = lines[lines.index("segment 1 of 1") + 1 :]
    turn = "advantage 1, log-prob a token: policy -0.5, engine -0.5"
    assert body == [
        "--- observation, 2 tokens", "w0 w1",
        f"--- turn 1, 2 tokens, {turn}", "w2 w3",
        "--- observation, 1 tokens", "w4",
        f"--- turn 2, 1 tokens, {turn}", "w5",
        "--- 1 more tokens", "w6",
    ]  # fmt: skip


def test_stored_text_cannot_act_on_a_terminal() -> None:
    hostile = "a\x1b[2Jb\r\u202ec\ud800\x07\nnext\tünïcode"
    assert printable(hostile) == "a\\x1b[2Jb\\r\\u202ec\\ud800\\x07\nnext\tünïcode"
    sample = make_sample("g\x1b]0;x", mask=[0, 1, 1])
    assert "\x1b" not in "".join(row_text(0, [sample], lambda ids: "\x1b[31m"))
