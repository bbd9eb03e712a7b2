"""A pool of environment worker processes behind an asyncio interface.

One process holds many environments (slots) and serves them one after the other; calls made in the
same turn of the event loop share one write. What can go wrong, and what it costs:

- an environment raises: EnvironmentFault for that call; the slot is good again after a reset.
- a worker dies, hangs or is killed: EnvironmentFault for every pending call of that worker, and for
  steps on its slots until they are reset; a new worker is started then.
- too many restarts: EnvironmentFault for every reset from then on.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from megatron_spear.envs.protocol import StepResult
from megatron_spear.errors import EnvironmentFault
from megatron_spear.rollout.env_link import WorkerLink

_LOG = logging.getLogger(__name__)


class Slot:
    """One environment in a worker, for one trajectory at a time."""

    __slots__ = ("link", "number", "worker")

    def __init__(self, worker: int, number: int) -> None:
        self.worker = worker
        self.number = number
        self.link: WorkerLink | None = None


class EnvironmentPool:
    """Environments in ``workers`` processes, made by ``factory(**options)``.

    Args:
        factory: ``package.module:callable`` giving a TextEnvironment; imported in the workers only.
        workers: number of processes; they start with their first slot.
        deadline_s: longest time one reset or step may take before its worker is killed.
        options: keyword arguments of the factory (picklable).
        max_restarts: worker deaths that are made good before every reset is refused.

    Example (in a coroutine)::

        pool = EnvironmentPool("my_game.environment:MyGame", workers=2, deadline_s=30.0)
        async with pool.slot() as slot:
            observation, info = await pool.reset(slot, seed=0, options={})
            result = await pool.step(slot, "look")

    Used from one event loop at a time, any thread; another loop may follow later.
    """

    def __init__(
        self,
        factory: str,
        *,
        workers: int,
        deadline_s: float,
        options: Mapping[str, Any] | None = None,
        max_restarts: int = 10,
    ) -> None:
        self.restarts = 0
        self._factory = factory
        self._options = dict(options or {})
        self._deadline_s = deadline_s
        self._max_restarts = max_restarts
        self._links: list[WorkerLink | None] = [None] * workers
        self._free: list[list[Slot]] = [[] for _ in range(workers)]
        self._num_open = [0] * workers
        self._num_made = [0] * workers
        self._closed = False

    async def open(self) -> Slot:
        """A slot in the least busy worker; reset it before the first step."""
        worker = min(range(len(self._links)), key=lambda w: self._num_open[w])
        self._num_open[worker] += 1
        if self._free[worker]:
            return self._free[worker].pop()
        self._num_made[worker] += 1
        return Slot(worker, self._num_made[worker])

    def close_slot(self, slot: Slot) -> None:
        """Give a slot back; its environment is kept and reset for the next trajectory."""
        self._num_open[slot.worker] -= 1
        self._free[slot.worker].append(slot)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """``open`` and ``close_slot`` around a block."""
        slot = await self.open()
        try:
            yield slot
        finally:
            self.close_slot(slot)

    async def reset(
        self, slot: Slot, *, seed: int, options: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Start a task; returns (observation, info). Raises EnvironmentFault."""
        slot.link = self._ready_link(slot.worker)
        answer = await slot.link.call(("reset", slot.number, (seed, options)))
        try:
            observation, info = answer
        except (TypeError, ValueError):
            raise EnvironmentFault(
                f"reset of {self._factory} returned {type(answer).__name__}; "
                "expected (observation, info)"
            ) from None
        return observation, info

    async def step(self, slot: Slot, action: str) -> StepResult:
        """Apply one action text. Raises EnvironmentFault."""
        if slot.link is None:
            raise EnvironmentFault("step before reset; reset the slot first")
        if slot.link.broken:
            raise EnvironmentFault(f"{slot.link.broken}; reset the slot first")
        answer = await slot.link.call(("step", slot.number, (action,)))
        try:
            return StepResult(*answer)
        except TypeError:
            raise EnvironmentFault(
                f"step of {self._factory} returned {type(answer).__name__}; expected "
                "(observation, reward, terminated, truncated, info)"
            ) from None

    def close(self) -> None:
        """End all workers; pending calls get EnvironmentFault."""
        self._closed = True
        for link in self._links:
            if link is not None:
                link.close()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ready_link(self, worker: int) -> WorkerLink:
        link = self._links[worker]
        if self._closed:
            raise EnvironmentFault("the environment pool is closed")
        if link is not None and link.alive:
            return link
        if link is not None:
            reason = link.broken or "the worker died while idle"
            if self.restarts >= self._max_restarts:
                raise EnvironmentFault(
                    f"environment workers were restarted {self.restarts} times, the most allowed; "
                    f"last: {reason}"
                )
            self.restarts += 1
            _LOG.warning("restart %d of an environment worker: %s", self.restarts, reason)
            link.close(wait_s=0.0)
        link = WorkerLink(
            f"environment worker {worker}", self._factory, self._options, self._deadline_s
        )
        self._links[worker] = link
        return link
