"""A piece of code run as a script, in a process that was forked for it."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import linecache
import os
import signal
import sys
import threading
import traceback
import types
from typing import Any

NAME = "code.py"
OUT_OF_MEMORY = signal.SIGRTMAX
"""How a script ends that ran out of memory, which no exit status would tell."""

# As they are before the script can replace them.
exit_at_once = os._exit
_settrace, _setprofile = sys.settrace, sys.setprofile


def run_as_script(code: bytes) -> None:
    """Run it as ``python code.py`` would, and end the process. Nothing returns from here."""
    _forget_ourselves()
    _renew_random_numbers()
    sys.argv = [NAME]
    sys.path.insert(0, os.getcwd())
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    # A line is out as soon as it is whole, so that it is seen though the deadline comes.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    status, out_of_memory = _execute(code)
    _settrace(None)
    _setprofile(None)
    _wind_up()
    if out_of_memory:
        signal.signal(OUT_OF_MEMORY, signal.SIG_DFL)
        os.kill(os.getpid(), OUT_OF_MEMORY)
    exit_at_once(status)


def _execute(code: bytes) -> tuple[int, bool]:
    """(exit status, was it the memory that ended it)."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    try:
        text = code.decode("utf-8")
        linecache.cache[NAME] = (len(text), None, text.splitlines(True), NAME)
        exec(compile(text, NAME, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as stop:
        return _exit_status(stop.code), False
    except BaseException as error:  # noqa: BLE001 - the script's own, shown as Python shows it
        out_of_memory = isinstance(error, MemoryError)
        with contextlib.suppress(BaseException):  # its text may raise as well
            trace = error.__traceback__
            traceback.print_exception(type(error), error, trace.tb_next if trace else None)
        return 1, out_of_memory
    return 0, False


def _exit_status(code: Any) -> int:
    """What Python makes of ``sys.exit(code)``."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    with contextlib.suppress(BaseException):  # the script's object
        sys.stderr.write(f"{code}\n")
    return 1


def _wind_up() -> None:
    """Wait for the threads, call what was registered, empty the buffers."""
    steps: list[Any] = [
        threading._shutdown,  # type: ignore[attr-defined]
        atexit._run_exitfuncs,
        lambda: sys.stdout.flush(),
        lambda: sys.stderr.flush(),
    ]
    for step in steps:
        with contextlib.suppress(BaseException):  # the script's own, and it is over
            step()


def _forget_ourselves() -> None:
    """Our modules are not there to import."""
    for name in [n for n in sys.modules if n.partition(".")[0] == __name__.partition(".")[0]]:
        del sys.modules[name]


def _renew_random_numbers() -> None:
    """Every fork has the generators of its parent; ``random`` renews its own by itself."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
