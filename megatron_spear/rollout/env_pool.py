"""A pool of environment worker processes behind an asyncio interface, here or on other machines.

One process holds many environments (slots) and serves them one after the other; calls made in the
same turn of the event loop share one write. What can go wrong, and what it costs:

- an environment raises: EnvironmentFault for that call; the slot is good again after a reset.
- a worker dies, or hangs past the deadline and is killed: EnvironmentFault for the call it was busy
  with. A new worker is started, and every other slot is brought to where it was when it is next
  used: same reset, same actions, and the answers must be the same again.
- a connection to a worker on another machine is lost: EnvironmentFault for the call that has waited
  longest; the others go on in another worker, as above.
- a worker dies time and again before it has answered anything, cannot be reached, or cannot load
  the environment: EnvironmentsLost for every call from then on.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

from megatron_spear.envs.protocol import StepResult
from megatron_spear.errors import EnvironmentFault, EnvironmentsLost
from megatron_spear.rollout.env_link import WorkerLink, WorkerLost
from megatron_spear.rollout.env_local import LocalWorker
from megatron_spear.rollout.env_remote import RemoteWorker, RemoteWorkers

_LOG = logging.getLogger(__name__)
_ANSWERS = {"reset": ("observation", "info"), "step": StepResult._fields}


class _Call(NamedTuple):
    """One answered call; ``seen`` is the answer without its info, which may not be comparable."""

    operation: str
    arguments: tuple[Any, ...]
    seen: tuple[Any, ...]


class Slot:
    """One environment in a worker, for one trajectory at a time.

    ``calls`` are those since the last reset, from which the environment can be made again in
    another worker; None until it is reset, and after a call that was not answered.
    """

    __slots__ = ("calls", "link", "number", "worker")

    def __init__(self, worker: int, number: int) -> None:
        self.worker = worker
        self.number = number
        self.link: WorkerLink | None = None
        self.calls: list[_Call] | None = None


class EnvironmentPool:
    """Environments in ``workers`` processes, made by ``factory(**options)``.

    Args:
        factory: ``package.module:callable`` giving a TextEnvironment; imported in the workers only.
        workers: number of processes; they start with their first slot.
        remote: how to reach workers on other machines; None = processes of our own.
        deadline_s: longest time one reset or step may take before its worker is killed.
        options: keyword arguments of the factory (picklable).
        max_restarts: restarts of one worker in a row, without an answer in between, before the
            pool gives up.

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
        max_restarts: int = 20,
        remote: RemoteWorkers | None = None,
    ) -> None:
        self._factory = factory
        self._options = dict(options or {})
        self._deadline_s = deadline_s
        self._max_restarts = max_restarts
        self._remote = remote
        self._links: list[WorkerLink | None] = [None] * workers
        self._deaths = [0] * workers
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
        slot.calls = None
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
        """Start a task; returns (observation, info). Raises EnvironmentFault, EnvironmentsLost."""
        slot.calls = []
        observation, info = await self._call(slot, "reset", (seed, options))
        return observation, info

    async def step(self, slot: Slot, action: str) -> StepResult:
        """Apply one action text. Raises EnvironmentFault, EnvironmentsLost."""
        return StepResult(*await self._call(slot, "step", (action,)))

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

    async def _call(
        self, slot: Slot, operation: str, arguments: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """The answer to a call; made again where the worker was lost in somebody else's call."""
        calls, slot.calls = slot.calls, None
        if calls is None:
            raise EnvironmentFault(f"{operation} without a reset; reset the slot first")
        while True:
            link = self._ready_link(slot.worker)
            try:
                if slot.link is not link:
                    await self._play_again(slot, link, calls)
                answer = await self._ask(slot, link, operation, arguments)
            except WorkerLost:
                continue
            self._deaths[slot.worker] = 0
            slot.calls = [*calls, _Call(operation, arguments, answer[:-1])]
            return answer

    async def _play_again(self, slot: Slot, link: WorkerLink, calls: list[_Call]) -> None:
        """Bring the slot's environment in a new worker to where it was in the lost one."""
        for number, (operation, arguments, seen) in enumerate(calls):
            answer = await self._ask(slot, link, operation, arguments)
            if answer[:-1] != seen:
                raise EnvironmentFault(
                    f"{self._factory} cannot be continued in a new worker: call {number} "
                    f"({operation}) gave {answer[:-1]!r}, before {seen!r}; expected the same to "
                    "the same seed and actions"
                )
        slot.link = link

    async def _ask(
        self, slot: Slot, link: WorkerLink, operation: str, arguments: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        answer = await link.call((operation, slot.number, arguments))
        if not isinstance(answer, tuple) or len(answer) != len(_ANSWERS[operation]):
            raise EnvironmentFault(
                f"{operation} of {self._factory} returned {answer!r:.200}; expected "
                f"({', '.join(_ANSWERS[operation])})"
            )
        return answer

    def _ready_link(self, worker: int) -> WorkerLink:
        link, name = self._links[worker], f"environment worker {worker}"
        if self._closed:
            raise EnvironmentFault("the environment pool is closed")
        if link is not None and link.alive():
            return link
        if link is not None:
            self._deaths[worker] += 1
            deaths = self._deaths[worker]
            if link.unusable:
                raise EnvironmentsLost(f"{link.broken}; correct that and start again")
            if deaths > self._max_restarts:
                raise EnvironmentsLost(
                    f"{name} ended {deaths} times in a row without answering a call; last: "
                    f"{link.broken}. Look above for what the environment itself wrote, and at the "
                    "machine's memory; a run that has a checkpoint can then be resumed"
                )
            _LOG.warning("%s is restarted (%d in a row): %s", name, deaths, link.broken)
        far_end = LocalWorker() if self._remote is None else RemoteWorker(self._remote, worker)
        link = WorkerLink(name, far_end, self._factory, self._options, self._deadline_s)
        self._links[worker] = link
        return link
