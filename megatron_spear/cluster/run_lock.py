"""Waits for a run that another process still holds.

The process that runs a run locks its directory (``trainer/run_directory.py``). When an attempt
begins that may be one of the attempt before, dying on a node that was lost, or one that is dead
while the file system has not noticed yet.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from megatron_spear.cluster.stop import StopSignals
from megatron_spear.errors import StopRequested


async def until_free(
    run: Path, limit_s: float, look_s: float, stop: StopSignals, say: Callable[[str], None]
) -> None:
    """Wait until no process holds the run; ``say`` is told once.

    Raises TimeoutError after ``limit_s``, StopRequested at a stop. Neither says that the run cannot
    work: another attempt may find it free.
    """
    give_up, told = time.monotonic() + limit_s, False
    while is_held(run):
        if stop.reason:
            raise StopRequested(f"{stop.reason} before it began")
        if time.monotonic() > give_up:
            raise TimeoutError(
                f"{run}: another process holds this run, for {limit_s:g} s now; stop it"
            )
        if not told:
            say(f"{run}: another process still holds this run; waiting up to {limit_s:g} s for it")
            told = True
        await asyncio.sleep(look_s)


def is_held(run: Path) -> bool:
    """Whether a process holds the run; False where the file system has no locks."""
    handle = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # told by the run itself
    finally:
        os.close(handle)
    return False
