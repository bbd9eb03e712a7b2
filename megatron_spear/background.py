"""Work beside the main thread."""

import threading
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


def abandonable(function: Callable[[], T], name: str) -> "Future[T]":
    """``in_background`` for what may never end: the process does not wait for the thread."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever waits may give up, the thread goes on

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  (told to whoever waits)
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def nothing_to_do() -> "Future[None]":
    """A future that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
