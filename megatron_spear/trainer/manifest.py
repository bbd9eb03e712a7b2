"""The manifest of a folder: size and sha256 of every file, and a hash of itself."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_spear.errors import CheckpointError
from megatron_spear.files import sync_file, sync_folder, write_whole

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def write_manifest(folder: Path, step: int) -> None:
    """Flush every file of ``folder`` to disk and write ``manifest.json`` last.

    It is ``{"step", "files": {name: {"bytes", "sha256"}}, "sha256"}``; the last is the hash of the
    rest, so that a flipped bit in the manifest shows too. Raises OSError (a full disk).
    """
    files = {}
    for path in _files(folder):
        sync_file(path)
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
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
        _check_file(folder / name, name, expected)
    for path in _files(folder):
        if (name := path.relative_to(folder).as_posix()) not in files:
            log.warning("%s: %s is not in its manifest, so it is not read", folder, name)


def _check_file(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes, expected {expected['bytes']}")
        found = _sha256(path)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror})") from error
    if found != expected["sha256"]:
        raise CheckpointError(
            f"{name} has sha256 {found[:12]}..., expected {expected['sha256'][:12]}..."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
