"""The fleet for the thread that trains: ``weight_sync.servers`` over an event loop."""

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from megatron_spear.rollout.engine import PauseMode
from megatron_spear.rollout.engines.dispatch import Member
from megatron_spear.rollout.engines.fleet import Fleet
from megatron_spear.rollout.engines.server import Group, Tensor
from megatron_spear.rollout.event_loop import EventLoop


class Named(Protocol):
    """A server, by its URL."""

    name: str


class FleetServer:
    """A ``weight_sync.servers.UpdateServer``; each future ends within the server's deadline."""

    def __init__(self, fleet: Fleet, member: Member, loop: EventLoop) -> None:
        assert member.info is not None, "a reachable server has answered"
        self.name = member.name
        self.num_ranks = member.info.num_ranks
        self.member = member
        self._fleet = fleet
        self._server = member.server
        self._loop = loop

    @property
    def serving(self) -> bool:
        """False until it is admitted, and from the moment it is taken out."""
        return self.member.out is None

    def parameter_names(self) -> "Future[frozenset[str] | None]":
        return self._loop.start(self._server.parameter_names())

    def begin_update(self) -> "Future[None]":
        return self._loop.start(self._writing(self._server.begin_update))

    def end_update(self, policy_version: int) -> "Future[None]":
        return self._loop.start(self._labelled(policy_version, self._server.end_update))

    def load_folder(self, folder: str, policy_version: int) -> "Future[None]":
        load = partial(self._server.load_folder, folder)
        return self._loop.start(self._labelled(policy_version, load))

    def join_group(self, group: Group, first_rank: int) -> "Future[None]":
        return self._loop.start(self._server.join_group(group, first_rank))

    def leave_group(self, name: str) -> "Future[None]":
        return self._loop.start(self._server.leave_group(name))

    def receive_broadcast(
        self, tensors: Sequence[Tensor], group: str, policy_version: int
    ) -> "Future[None]":
        receive = partial(self._server.receive_broadcast, tensors, group)
        return self._loop.start(self._writing(receive))

    def receive_payloads(
        self, payloads: Sequence[bytes], load_format: str | None, policy_version: int
    ) -> "Future[None]":
        receive = partial(self._server.receive_payloads, payloads, load_format)
        return self._loop.start(self._writing(receive))

    async def _writing(self, call: Callable[[], Awaitable[None]]) -> None:
        """Do what leaves the server with a mixture of weights until it is admitted again."""
        self.member.intact = False
        await call()

    async def _labelled(
        self, policy_version: int, finish: Callable[[str], Awaitable[None]]
    ) -> None:
        """Do what makes the weights a version; EngineError if it may not be given to the server."""
        self._fleet.roster.check_version(self.member, policy_version)
        await self._writing(partial(finish, self._fleet.labels.label(policy_version)))


class FleetUpdates:
    """``weight_sync.servers.UpdateServers`` of a fleet whose coroutines run on ``loop``."""

    def __init__(self, fleet: Fleet, loop: EventLoop, mode: PauseMode) -> None:
        self._fleet = fleet
        self._loop = loop
        self._mode = mode

    def reachable(self) -> Sequence[FleetServer]:
        members = self._loop.run(self._fleet.reachable())
        return [FleetServer(self._fleet, member, self._loop) for member in members]

    def pause(self) -> None:
        self._loop.run(self._fleet.pause(self._mode))

    def resume(self) -> None:
        self._loop.run(self._fleet.resume())

    def take_out(self, server: Named, why: str) -> None:
        self._loop.run(self._take_out(self._fleet.roster.member(server.name), why))

    def admit(self, server: Named, policy_version: int) -> None:
        self._loop.run(self._fleet.admit(self._fleet.roster.member(server.name), policy_version))

    async def _take_out(self, member: Member, why: str) -> None:
        self._fleet.roster.take_out(member, why)
