"""Servers on the GPUs that train: they give their memory back while the policy computes."""

import asyncio
from collections.abc import Awaitable, Callable

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.dispatch import Member
from megatron_spear.rollout.engines.fleet import Fleet
from megatron_spear.rollout.event_loop import EventLoop


class FleetMemory:
    """The memory of a fleet's servers, for the thread that trains; the fleet runs on ``loop``.

    Between ``release`` and the whole weight update that follows ``resume`` nothing may be
    generated. A server that fails in either is taken out.
    """

    def __init__(self, fleet: Fleet, loop: EventLoop) -> None:
        self._fleet = fleet
        self._loop = loop
        self._released: list[Member] = []

    def release(self) -> None:
        """Have the serving servers give back the memory of weights and caches."""
        self._released = [member for member in self._fleet.roster.members if member.out is None]
        self._loop.run(self._each(self._release, "release"))

    def resume(self) -> None:
        """Have them take it again; their weights are undefined until the next update."""
        self._loop.run(self._each(lambda member: member.server.resume_memory(), "take"))
        self._released = []

    async def _release(self, member: Member) -> None:
        member.intact = False
        await member.server.release_memory()

    async def _each(self, call: Callable[[Member], Awaitable[None]], what: str) -> None:
        async def one(member: Member) -> None:
            try:
                await call(member)
            except EngineError as error:
                self._fleet.roster.take_out(member, f"it did not {what} its memory: {error}")

        await asyncio.gather(*map(one, self._released))
