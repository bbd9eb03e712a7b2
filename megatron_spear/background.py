"""Work beside the main thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_background(function: Callable[[], T], name: str) -> "Future[T]":
    """Start ``function`` in a thread of this name; what it gives or raises is in the future.

    The process does not end before it has ended, so it has to be quick or told to stop.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def nothing_to_do() -> "Future[None]":
    """A future that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
