"""The most bytes of tensors that live at once while a block of code runs on a CPU.

torch's CPU allocator tells its profiler of every block that it hands out or takes back, those that
kernels use inside an operation too. Added up in order they are the live bytes at any time. What was
there before the block is not counted, nor are files that are mapped.

A block that another thread gives back (gloo's, of a collective's tensors) is not told. It counts as
given back when its address is handed out again, so what is found may be a little too high.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class LiveBytes:
    """What was found; set at the end of the block."""

    peak: int = 0
    """Most bytes at once."""
    left: int = 0
    """Bytes that outlive the block."""


@contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    """Count in this thread, whose backward passes on a CPU run in it too.

    Example: ``with live_bytes() as found: a = torch.zeros(10); del a`` gives a peak of 40.
    """
    from torch.profiler import ProfilerActivity, profile

    found = LiveBytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield found
    live: dict[int, int] = {}
    for _, address, size in sorted(_blocks(seen)):
        found.left -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            found.left += size
        found.peak = max(found.peak, found.left)


def _blocks(seen: Any) -> Iterator[tuple[int, int, int]]:
    """Time, address and bytes (negative: given back) of each block that was told."""
    from torch._C._profiler import _EventType

    waiting = list(seen.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            yield event.start_time_ns, fields.ptr, fields.alloc_size
