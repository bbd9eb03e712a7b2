"""A file is there whole or not at all; a full disk is known in every library's words."""

import errno
import os
from pathlib import Path

import pytest

from megatron_spear.files import says_disk_full, write_whole


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_everything_is_on_disk_before_the_new_name_is_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "a", []
    path.write_text("old")

    def note(descriptor: int) -> None:
        calls.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.read_text()))

    monkeypatch.setattr(os, "fsync", note)
    write_whole(path, "new")
    assert calls == [(f"{path}.tmp", "old"), (str(tmp_path), "new")]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("Worker failure: [Errno 28] No space left on device"), True),
        (Exception("No space left on device (os error 28)"), True),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_a_full_disk_is_known(error: Exception, full: bool) -> None:
    assert says_disk_full(error) is full
