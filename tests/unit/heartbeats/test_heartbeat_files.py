"""Heartbeat files: small, written in place, read as a whole or not at all, of one launch."""

import json
import os
import threading
from pathlib import Path

import pytest

from megatron_spear.heartbeats.record import Hang, Heartbeat, HeartbeatFolder


def heartbeat(rank: int = 1, **fields: object) -> Heartbeat:
    given = {"host": "n2", "pid": 4711, "beats": 3, "moves": 40, "still_s": 0.5, "doing": "step 3"}
    return Heartbeat(rank=rank, **{**given, **fields})  # type: ignore[arg-type]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = HeartbeatFolder(tmp_path, "launch 1")
    long = heartbeat(doing="x" * 140, at="a.py:1 in f", waits_in="all_reduce", ended="well")
    for beat in (long, heartbeat(beats=4)):  # the shorter leaves nothing of the longer
        folder.write(beat)
        assert folder.read(1) == beat
        assert (tmp_path / "rank_1.json").stat().st_size == 2048
    assert folder.read(0) is None


def test_long_and_foreign_texts_are_cut_to_fit(tmp_path: Path) -> None:
    folder = HeartbeatFolder(tmp_path, "l" * 100)
    folder.write(heartbeat(doing='"' * 900, at="\\" * 900, waits_in="\n" * 900, ended="日" * 900))
    found = folder.read(1)
    assert found is not None and found.doing == '"' * 150 and found.ended == "?" * 150


def test_another_launchs_file_is_not_seen_and_overwritten(tmp_path: Path) -> None:
    old, new = HeartbeatFolder(tmp_path, "old"), HeartbeatFolder(tmp_path, "new")
    old.write(heartbeat())
    old.announce(Hang(rank=2, host="n1", pid=7, token="a"))
    assert new.read(1) is None and new.hang() is None
    new.write(heartbeat(beats=1))
    new.announce(Hang(rank=0, host="n1", pid=8, token="b"))
    assert new.read(1) == heartbeat(beats=1) and new.hang() == Hang(
        rank=0, host="n1", pid=8, token="b"
    )
    assert old.read(1) is None


def test_a_launch_begins_without_files_of_earlier_ones(tmp_path: Path) -> None:
    """Also if it has the same name as they had."""
    folder = HeartbeatFolder(tmp_path / "heartbeats", "localhost/29500/none/0")
    folder.begin()
    folder.write(heartbeat())
    folder.announce(Hang(rank=2, host="n1", pid=7, token="a"))
    folder.begin()
    assert folder.read(1) is None and folder.hang() is None


def test_the_first_word_of_a_hang_stays(tmp_path: Path) -> None:
    folder = HeartbeatFolder(tmp_path, "one")
    folder.announce(Hang(rank=2, host="n1", pid=7, token="a"))
    folder.announce(Hang(rank=0, host="n1", pid=8, token="b"))
    assert folder.hang() == Hang(rank=2, host="n1", pid=7, token="a")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 2048, b'{"launch": "one", "rank": 1', b"[]", b'{"launch": "one"}']
)
def test_a_broken_file_is_no_heartbeat(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rank_1.json").write_bytes(content)
    assert HeartbeatFolder(tmp_path, "one").read(1) is None


def test_without_the_folder_nothing_is_made(tmp_path: Path) -> None:
    folder = HeartbeatFolder(tmp_path / "later", "one")
    with pytest.raises(FileNotFoundError):
        folder.write(heartbeat())
    assert folder.read(1) is None and folder.hang() is None
    assert not (tmp_path / "later").exists()


def test_a_reader_never_sees_a_mixture(tmp_path: Path) -> None:
    folder, done = HeartbeatFolder(tmp_path, "one"), threading.Event()

    def write() -> None:
        for number in range(2000):
            letter = "ab"[number % 2]
            folder.write(heartbeat(doing=letter * 150, at=letter * 150, beats=number))
        done.set()

    folder.write(heartbeat(doing="a" * 150, at="a" * 150))
    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set():
        beat = folder.read(1)
        if beat is not None:
            assert beat.doing == beat.at
            seen += 1
    writer.join()
    assert seen > 100


def test_a_write_makes_no_new_file(tmp_path: Path) -> None:
    """So that a disk that fills later takes nothing away."""
    folder = HeartbeatFolder(tmp_path, "one")
    folder.write(heartbeat())
    inode = os.stat(tmp_path / "rank_1.json").st_ino
    folder.write(heartbeat(beats=9))
    assert os.stat(tmp_path / "rank_1.json").st_ino == inode
    assert sorted(os.listdir(tmp_path)) == ["rank_1.json"]
    assert json.loads((tmp_path / "rank_1.json").read_text())["beats"] == 9


def test_it_says_where_in_words() -> None:
    assert heartbeat(at="a.py:1 in f").where == "step 3, at a.py:1 in f"
    waits = heartbeat(at="a.py:1 in f", waits_in="all_reduce")
    assert waits.where == "step 3, waits in all_reduce at a.py:1 in f"
    assert heartbeat().where == "step 3" and heartbeat().name == "rank 1 on n2 (pid 4711)"
