"""The manifest of a folder: size and sha256 of every file, and a hash of itself."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_spear.errors import CheckpointError
from megatron_spear.files import sync_file, sync_folder, write_whole
from megatron_spear.heartbeats.heart import beat

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

MANIFEST = "manifest.json"
_MAX_THREADS = 16
_CHUNK = 1 << 22
"""Bytes after which a read counts as a movement: one rank reads a whole checkpoint, hundreds of GB
of a large model."""


def write_manifest(folder: Path, step: int) -> None:
    """Flush every file of ``folder`` to disk and write ``manifest.json`` last.

    It is ``{"step", "files": {name: {"bytes", "sha256"}}, "sha256"}``; the last is the hash of the
    rest, so that a flipped bit in the manifest shows too. Raises OSError (a full disk).
    """
    paths = _files(folder)
    entries = _side_by_side(_synced_entry, paths)
    names = [path.relative_to(folder).as_posix() for path in paths]
    files = dict(zip(names, entries, strict=True))
    record: dict[str, Any] = {"step": step, "files": files}
    record["sha256"] = _own_hash(record)
    write_whole(folder / MANIFEST, json.dumps(record, indent=1))
    for root, _, _ in os.walk(folder):
        sync_folder(Path(root))


def check_manifest(folder: Path, step: int) -> None:
    """Return if the folder is whole; else raise CheckpointError naming the first thing wrong.

    A file that the manifest does not name is no damage: it is told, and nobody reads it.
    """
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = record["files"]
        own = record.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is missing or cut off ({error})") from error
    if own != _own_hash(record):
        raise CheckpointError(f"{MANIFEST} does not match its own sha256")
    if record["step"] != step:
        raise CheckpointError(f"{MANIFEST} speaks of step {record['step']}, expected {step}")
    for name, expected in files.items():
        _check_size(folder / name, name, expected["bytes"])
    _side_by_side(lambda name: _check_hash(folder / name, name, files[name]["sha256"]), files)
    for path in _files(folder):
        if (name := path.relative_to(folder).as_posix()) not in files:
            log.warning("%s: %s is not in its manifest, so it is not read", folder, name)


def _check_size(path: Path, name: str, expected: int) -> None:
    """All sizes before the first hash: what is missing or cut off is found at once."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror})") from error
    if size != expected:
        raise CheckpointError(f"{name} has {size} bytes, expected {expected}")


def _check_hash(path: Path, name: str, expected: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror})") from error
    if found != expected:
        raise CheckpointError(f"{name} has sha256 {found[:12]}..., expected {expected[:12]}...")


def _synced_entry(path: Path) -> dict[str, Any]:
    sync_file(path)
    beat()
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _side_by_side(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """The results in order, or the error of the first in order that fails; each rank has files of
    its own, and hashing one file after the other would take minutes for a large model."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "manifest") as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            beat()
    return digest.hexdigest()


def _own_hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
