"""Where a thread stands, in a few words: the own line it is at, and whether it waits for others."""

import linecache
import os
import sys
from dataclasses import dataclass
from types import FrameType

_COLLECTIVES = tuple(
    os.path.join("torch", "distributed", name)
    for name in ("distributed_c10d.py", "c10d_logger.py", "rendezvous.py")
)
_WAITING_CALLS = {".wait(": "a transfer between ranks", "synchronize(": "its GPU"}
_LIBRARIES = (os.path.join("torch", ""), os.path.join("megatron", "core"))
_MAX_FRAMES = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """``at``: the innermost line outside of Python's own library and torch; ``waits_in``: the
    collective call (or transfer, or the GPU) that the thread is in, empty where it works itself.

    Example: ``Place(at="clip_grads.py:87 in get_grad_norm", waits_in="all_reduce")``.
    """

    at: str = ""
    waits_in: str = ""


def place_of(thread: int) -> Place:
    """Where a thread of this process is now; ``thread`` is its ``threading.get_ident()``.

    Costs some microseconds. What a C call does is only seen by the Python line that called it.
    """
    frame = sys._current_frames().get(thread)
    return Place() if frame is None else place_of_frame(frame)


def place_of_frame(frame: FrameType) -> Place:
    """``place_of`` of the thread whose innermost frame this is."""
    waits_in, at = _wait_at(frame), ""
    looked_at: FrameType | None = frame
    for _ in range(_MAX_FRAMES):
        if looked_at is None:
            break
        file = looked_at.f_code.co_filename
        if file.endswith(_COLLECTIVES):
            name = looked_at.f_code.co_name
            if not waits_in or not name.startswith(("wrapper", "_")):
                waits_in = name  # the outermost, which the own line calls
        elif not at and not _is_library(file):
            at = f"{os.path.basename(file)}:{_line_of(looked_at)} in {looked_at.f_code.co_name}"
            break
        looked_at = looked_at.f_back
    return Place(at=at, waits_in=waits_in)


def _wait_at(frame: FrameType) -> str:
    """What the innermost line waits for, where torch or Megatron do; the line's text says so."""
    file = frame.f_code.co_filename
    if not any(name in file for name in _LIBRARIES):
        return ""
    line = linecache.getline(file, _line_of(frame))
    return next((what for call, what in _WAITING_CALLS.items() if call in line), "")


def _line_of(frame: FrameType) -> int:
    """Another thread's frame has no line for a moment now and then: then its function's first."""
    return frame.f_lineno or frame.f_code.co_firstlineno


def _is_library(file: str) -> bool:
    """Python's own, or torch: their lines tell a user nothing."""
    return (
        file.startswith("<frozen")
        or os.path.join("torch", "") in file
        or (file.startswith(os.path.dirname(os.__file__) + os.sep) and "site-packages" not in file)
    )
