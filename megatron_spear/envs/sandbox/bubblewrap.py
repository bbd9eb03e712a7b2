"""The command that starts an interpreter shut in by bubblewrap, and the user that it has.

Inside there are the system's programs and libraries (``/usr``), the interpreter's folders, an empty
``/tmp`` and five devices, all but ``/tmp`` read-only; no network, no other process, no variable of
ours. The interpreter keeps one right, to make namespaces and mounts for each execution; the code
itself has none (``inside.jail``).
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.envs.sandbox.interpreter import Interpreter, open_to_all

NOBODY = 65534
"""The user as which root runs the code."""

INSTALL = "install bubblewrap (apt-get install bubblewrap)"
VARIABLES = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # sets have the same order in each execution
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}
"""The environment of the code."""

_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}
_SYSTEM_FOLDERS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SYSTEM_FILES = ("/etc/alternatives", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Start:
    """How to start a process: its command, and the user to become (None: stay who we are)."""

    command: tuple[str, ...]
    uid: int | None


def find_bubblewrap() -> str | None:
    """Its program, if it is installed."""
    return shutil.which("bwrap")


def user_without_rights() -> int | None:
    """The user to run code as: NOBODY for root, where that user exists in our user namespace; else
    None, our own."""
    if os.geteuid() != 0:
        return None
    for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines():
        begin, _, count = map(int, line.split())
        if begin <= NOBODY < begin + count:
            return NOBODY
    return None


def shut_in(
    bwrap: str, interpreter: Interpreter, arguments: Sequence[str], disk_bytes: int
) -> Start:
    """The interpreter with arguments, inside bubblewrap."""
    uid = user_without_rights()
    hidden = uid is not None and not all(open_to_all(f) for f in interpreter.folders)
    sources = [f"/tmp/{i}" if hidden else f for i, f in enumerate(interpreter.folders)]
    command = [bwrap, *_options(disk_bytes)]
    for source, folder in zip(sources, interpreter.folders, strict=True):
        command += ["--ro-bind", source, folder]
    command += ["--remount-ro", "/", "--chdir", "/tmp", interpreter.program, *arguments]
    if not hidden:
        return Start(tuple(command), uid)
    reach = [sys.executable, "-I", "-S", str(Path(__file__).with_name("reach.py")), str(uid)]
    return Start((*reach, *interpreter.folders, "--", *command), None)


def _options(disk_bytes: int) -> list[str]:
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    # bubblewrap's own process 1 could be written to by whatever runs as its user.
    options += ["--as-pid-1"]
    options += ["--hostname", "sandbox", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    for name, value in VARIABLES.items():
        options += ["--setenv", name, value]
    options += ["--ro-bind", "/usr", "/usr"]
    for folder in _SYSTEM_FOLDERS:
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    for place in _SYSTEM_FILES:
        options += ["--ro-bind-try", place, place]
    options += ["--proc", "/proc", "--tmpfs", "/dev", "--dir", "/dev/shm"]
    for device in _DEVICES:
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for name, number in _LINKS.items():
        options += ["--symlink", f"/proc/self/fd{number}", f"/dev/{name}"]
    return [*options, "--remount-ro", "/dev", "--size", str(disk_bytes), "--tmpfs", "/tmp"]
