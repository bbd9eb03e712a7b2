"""An asyncio event loop in a thread of its own: rollouts go on while the policy trains."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from megatron_spear.errors import EngineError

T = TypeVar("T")

_CLOSE_S = 10.0


class EventLoop:
    """A running event loop; other threads hand it coroutines.

    ``set_up`` is called in the thread first (torch's number of threads counts by thread, say).

    Example::

        with EventLoop("rollout") as loop:
            later = loop.start(rollouter.collect(...))
            train()
            groups = later.result()
    """

    def __init__(self, name: str, set_up: Callable[[], object] = lambda: None) -> None:
        self._loop = asyncio.new_event_loop()
        self._set_up = set_up
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> "EventLoop":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Begin a coroutine; EngineError if the loop was closed. Cancelling the future cancels
        it."""
        if not self._thread.is_alive():
            work.close()
            raise EngineError(f"the event loop {self._thread.name!r} is closed; make another one")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns or raises. What interrupts the wait cancels it."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            if future.cancel():  # the wait was interrupted, by Ctrl-C say
                self._settle()
            raise

    def cancel_all(self) -> None:
        """Cancel what is under way and let it end."""

        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=_CLOSE_S)

        self.run(cancel())

    def close(self) -> None:
        """Cancel what is under way and end the thread; a second call does nothing."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)

    def _settle(self) -> None:
        """Let cancelled coroutines come to their end."""
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(_CLOSE_S)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._set_up()
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            if left:
                ending = asyncio.wait(left, timeout=_CLOSE_S)
                self._loop.run_until_complete(ending)
        finally:
            self._loop.close()
