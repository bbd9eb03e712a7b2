"""How processes of a run find each other: one small file each in a folder that all nodes see.

A file is written beside its place and renamed, so a reader sees all of it or nothing; one that is
broken all the same (a file system without atomic renames, a full disk) is passed over and read
again later. A server that comes back under another address writes the same file anew.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_spear.files import write_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Registration:
    """One process that can be reached.

    ``role`` and ``index`` name it in the whole run: ``engine`` 3, ``environment`` 0, ``trainer`` 0
    (where the ranks meet). ``launch`` counts its starts, so that a restarted one can be told.
    ``address`` is a URL for engines, ``host:port`` otherwise.

    Example: ``engine_3.json`` is ``{"role": "engine", "index": 3, "address": "http://n4:41873",
    "node": "n4", "pid": 4711, "launch": 0}``.
    """

    role: str
    index: int
    address: str
    node: str
    pid: int
    launch: int = 0


def register(folder: Path, registration: Registration) -> None:
    """Write the file of one process; replaces that of an earlier start."""
    write_whole(_file(folder, registration.role, registration.index), _dump(registration))


def unregister(folder: Path, role: str, index: int) -> None:
    """Remove the file of a process that cannot be reached any more; harmless if there is none."""
    _file(folder, role, index).unlink(missing_ok=True)


def registrations(folder: Path, role: str) -> list[Registration]:
    """Those of one role that can be read now, by index."""
    found = (_read(path) for path in folder.glob(f"{role}_*.json"))
    return sorted((r for r in found if r is not None and r.role == role), key=lambda r: r.index)


def registration(folder: Path, role: str, index: int) -> Registration | None:
    """That of one process; None while there is none, or none that can be read."""
    found = _read(_file(folder, role, index))
    return found if found is not None and (found.role, found.index) == (role, index) else None


def _file(folder: Path, role: str, index: int) -> Path:
    return folder / f"{role}_{index}.json"


def _dump(registration: Registration) -> str:
    return json.dumps(asdict(registration)) + "\n"


def _read(path: Path) -> Registration | None:
    try:
        return Registration(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("registration %s cannot be read yet (%s); it is passed over", path, error)
        return None
