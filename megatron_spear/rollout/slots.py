"""Places for attempts: so many at once, those of the earliest step first."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """``number`` places, all of one event loop. One that becomes free goes to the lowest ``step``
    that waits, and among equals to the one that came first.

    Example: with 1 place, held, and waiters of steps 2, 2, 1: step 1 gets it next, then the two of
    step 2 in the order in which they came.
    """

    def __init__(self, number: int) -> None:
        self._num_free = number
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def held(self, step: int) -> AsyncIterator[None]:
        """A place around a block; waits for one."""
        await self._take(step)
        try:
            yield
        finally:
            self._give_back()

    async def _take(self, step: int) -> None:
        if self._num_free:  # then nobody waits: places are handed on
            self._num_free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (step, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it has the place already
                self._give_back()
            raise

    def _give_back(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1
