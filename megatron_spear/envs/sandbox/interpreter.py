"""Which Python runs the code, and the folders that it needs."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.errors import ConfigError

SYSTEM_PYTHON = "/usr/bin/python3"
OWN_FOLDERS = ("/tmp", "/dev", "/proc")
_OLDEST = (3, 8)
_PROBE = (
    "import json, sys; print(json.dumps([sys.version_info[:2], sys.executable, sys.prefix] + "
    "[getattr(sys, name, sys.prefix) for name in ('base_prefix', 'base_exec_prefix')]))"
)
_PROBE_S = 30.0


@dataclass(frozen=True)
class Interpreter:
    """An interpreter and the folders, beside the system's own, in which it has its files.

    Example: a virtual environment ``/opt/code`` made by ``/opt/python3.11/bin/python``
    is ``Interpreter("/opt/code/bin/python", ("/opt/code", "/opt/python3.11"))``.
    """

    program: str
    folders: tuple[str, ...]


def default_python() -> str:
    """The system's, or the one that the virtual environment of this program was made by."""
    if os.access(SYSTEM_PYTHON, os.X_OK):
        return SYSTEM_PYTHON
    return os.path.join(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")


@functools.cache
def find_interpreter(python: str | None) -> Interpreter:
    """What ``sandbox.python`` names. Raises ConfigError where it is no Python that can be used."""
    program = os.path.abspath(python or default_python())
    try:
        done = subprocess.run(
            [program, "-s", "-c", _PROBE],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_PROBE_S,
            check=True,
            cwd="/",
        )
        version, executable, *folders = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"sandbox.python={program} cannot be run: {error}; expected a Python interpreter"
        ) from error
    if tuple(version) < _OLDEST:
        raise ConfigError(
            f"sandbox.python={program} is Python {version[0]}.{version[1]}; expected "
            f"{_OLDEST[0]}.{_OLDEST[1]} or newer"
        )
    needed = {place for folder in folders for place in (folder, os.path.realpath(folder))}
    apart = {place for place in needed if not _is_in(place, "/usr")}
    for place in apart:
        if place == "/" or any(_is_in(place, own) for own in OWN_FOLDERS):
            raise ConfigError(
                f"sandbox.python={program} has files in {place}; expected a folder that is not in "
                f"{', '.join(OWN_FOLDERS)}, where the sandbox has its own"
            )
    # A folder inside another one is there with it.
    outer = {p for p in apart if not any(_is_in(p, q) for q in apart - {p})}
    return Interpreter(executable or program, tuple(sorted(outer)))


def _is_in(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder + "/")


def open_to_all(path: str) -> bool:
    """Whether a user without any rights can read a folder or run a file."""
    place = Path(os.path.realpath(path))
    return all(os.stat(p).st_mode & 0o001 for p in (place, *place.parents)) and bool(
        os.stat(place).st_mode & 0o004
    )
