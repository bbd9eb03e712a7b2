"""Files of a conversion, written one by one: resumable, checked by hash, by several processes.

A conversion is a list of ``Shard``s, files that know what goes into them. They are written into a
working folder beside the target; what is finished has a note with its hash. A conversion that was
stopped finds these notes when it is started again, checks the files, and writes only the rest. At
the end the folder is put in place by one rename: it is whole or not there.
"""

import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from megatron_spear.conversion.hf_io import full_disk_told
from megatron_spear.errors import CheckpointError
from megatron_spear.files import sync_folder, write_whole

NOTES = ".finished"
_HASHED_AT_A_TIME = 2**24
_SENT_AT_A_TIME = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file: its name, and what goes into it, which the function that writes it understands."""

    file: str
    content: Any


WriteShard = Callable[[BinaryIO, Shard], Any]
"""Writes a shard's content into an open file; gives notes on it that JSON can hold, not null."""


def work_folder(target: Path) -> Path:
    """Where files are written before the folder is put in place; its size shows the progress."""
    return target.with_name(f".{target.name}.partial")


def write_shards(
    target: Path,
    shards: Sequence[Shard],
    write: WriteShard,
    finish: Callable[[Path, Mapping[str, Any]], None],
    *,
    about: Mapping[str, Any],
    processes: int = 1,
) -> None:
    """Write all shards and make ``target`` of them.

    Args:
        target: the folder to make; must not exist, or be empty.
        shards: the files.
        write: makes a shard's content; a function of a module, as it may run in other processes.
        finish: adds to the folder what describes it, from each file's notes, before it is put in
            place.
        about: what the conversion is of, so that another one is not continued by mistake.
        processes: how many write at a time.

    Raises CheckpointError if the target is not empty, the disk is full, or what an earlier,
    stopped conversion left was of something else.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; give another folder")
    work = work_folder(target)
    with full_disk_told(target, kept=work):
        (work / NOTES).mkdir(parents=True, exist_ok=True)
        _same_conversion(work, target, about)
        found = {shard.file: _finished(work, shard) for shard in shards}
        left = [shard for shard in shards if found[shard.file] is None]
        found |= {shard.file: notes for shard, notes in _run(work, left, write, processes)}
        finish(work, found)
        shutil.rmtree(work / NOTES)
        sync_folder(work)
        if target.exists():
            target.rmdir()
        work.replace(target)
        sync_folder(target.parent)


def _same_conversion(work: Path, target: Path, about: Mapping[str, Any]) -> None:
    note = work / NOTES / "conversion.json"
    text = json.dumps(about, sort_keys=True)
    if not note.is_file():
        write_whole(note, text)
    elif note.read_text() != text:
        raise CheckpointError(
            f"{work} holds a stopped conversion with other settings or of another source, "
            f"{note.read_text()}; this one is {text}. Delete it to start {target} anew"
        )


def _run(
    work: Path, shards: Sequence[Shard], write: WriteShard, processes: int
) -> Iterator[tuple[Shard, Any]]:
    one = functools.partial(_write_one, work, write)
    if processes == 1 or len(shards) < 2:
        yield from ((shard, one(shard)) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")
    count = min(processes, len(shards))
    with ProcessPoolExecutor(count, mp_context=context, initializer=_finish_on_ctrl_c) as pool:
        running = {pool.submit(one, shard): shard for shard in shards}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _finish_on_ctrl_c() -> None:
    """The main process stops for all; a file that is being written is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_one(work: Path, write: WriteShard, shard: Shard) -> Any:
    """Write the file, flush it, and note its hash; in whichever process."""
    path = work / shard.file
    with _Hashed(path.open("wb", buffering=0)) as file:
        notes = write(file, shard)
        file.sync()
    noted = {"hash": file.state.hexdigest(), "bytes": path.stat().st_size, "notes": notes}
    write_whole(_note_of(work, shard), json.dumps(noted))
    return notes


def _finished(work: Path, shard: Shard) -> Any:
    """The notes of a file that an earlier run finished and that is still what it was, or None."""
    note, path = _note_of(work, shard), work / shard.file
    if not note.is_file() or not path.is_file():
        return None
    noted = json.loads(note.read_text())
    if path.stat().st_size != noted["bytes"] or _hash(path) != noted["hash"]:
        return None
    return noted["notes"]


def _note_of(work: Path, shard: Shard) -> Path:
    return work / NOTES / f"{shard.file}.json"


class _Hashed(io.BufferedWriter):
    """A file written in order, with the XXH3 of what was written.

    A thread brings it to disk meanwhile, so that neither the disk nor the conversion waits.
    """

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.state = xxhash.xxh3_128()
        self._written = self._sent = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._sending: Future[None] | None = None

    def write(self, content: Any) -> int:
        self.state.update(content)
        size = super().write(content)
        self._written += size
        if self._written - self._sent > _SENT_AT_A_TIME and self._ready():
            self._sent = self._written
            self._sending = self._thread.submit(os.fdatasync, self.fileno())
        return size

    def sync(self) -> None:
        """All of it is on disk when this returns."""
        self.flush()
        self._thread.submit(os.fsync, self.fileno()).result()

    def close(self) -> None:
        self._thread.shutdown()  # before the file number is given to another file
        super().close()

    def _ready(self) -> bool:
        if self._sending is None or not self._sending.done():
            return self._sending is None
        self._sending.result()  # a disk error belongs to the writer
        return True


def _hash(path: Path) -> str:
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_HASHED_AT_A_TIME))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            state.update(buffer[:got])
    return state.hexdigest()
