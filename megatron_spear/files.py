"""Files that are there whole or not at all, and what a full disk looks like."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_spear.errors import ConfigError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_IN_WORDS = ("no space left", "quota exceeded", "file too large")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Text is written as UTF-8. Raises OSError (a full disk); the file is then what it was before.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An open file that becomes ``path`` when the block ends well, and is removed when it does not.

    A kill leaves the old file and a ``.tmp`` beside it. A power cut may lose what was not synced.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_folder_of(path: Path) -> None:
    """Make the folder that a file is to be written into, and those above it.

    Raises ConfigError where a file stands in the way, OSError for a folder that cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{path}: {error.filename} is a file, expected a folder; give another path"
        ) from error


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (names, renames) to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def says_disk_full(error: BaseException) -> bool:
    """Whether a failed write met a full disk or a quota."""
    return disk_full_behind(error) is not None


def disk_full_behind(error: BaseException) -> BaseException | None:
    """The error that speaks of a full disk or a quota: this one, or one it came up in the handling
    of (torch's "unexpected pos" hides what the system said).

    torch, safetensors and tokenizers raise errors of their own for it, so the text counts too.
    """
    text = str(error).lower()
    if getattr(error, "errno", None) in _FULL or any(words in text for words in _FULL_IN_WORDS):
        return error
    return None if error.__context__ is None else disk_full_behind(error.__context__)
