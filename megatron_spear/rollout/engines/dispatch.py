"""Which server of a fleet a request goes to, and in which order those that wait get one."""

import asyncio
import heapq
import itertools
from collections.abc import Sequence
from types import TracebackType

from megatron_spear.rollout.engines.http import ServerLost
from megatron_spear.rollout.engines.server import EngineServer, ServerInfo


class Member:
    """A server of the fleet and what the fleet knows of it.

    ``out`` says why it gets no requests, None = it serves. ``version`` is the policy version it was
    admitted with, -1 before. ``reachable``: it answers and may take the next weight update.
    ``paused``: it was told to pause and not yet to go on. ``info``: None until it answered first.
    ``misses``: health checks in a row that it did not answer. ``heard_s``: the event loop's time of
    its last answer to a request. ``intact``: it holds all of ``version``, no update was begun on it
    since. ``lost_s``: when it stopped to answer, where that alone is why it is out; ``num_lost``:
    how often that was since it last answered a request.
    """

    def __init__(self, server: EngineServer) -> None:
        self.server = server
        self.name = server.name
        self.out: str | None = "it has not been given this run's weights"
        self.version = -1
        self.reachable = False
        self.paused = False
        self.info: ServerInfo | None = None
        self.misses = 0
        self.heard_s = 0.0
        self.intact = False
        self.lost_s: float | None = None
        self.num_lost = 0
        self.in_flight = 0
        self.flights: set[Flight] = set()
        self.waiting: list[_Ticket] = []

    def take_out(self, why: str) -> None:
        """Send it nothing more; what is under way there is sent again elsewhere."""
        self.out = why
        self.lost_s = None
        self.reachable = False
        for flight in tuple(self.flights):
            flight.interrupt()


class TakenOut(ServerLost):
    """The server was taken out while it had a request, for a reason of its own."""


class Flight:
    """A request under way: ``async with`` raises TakenOut when its server is taken out."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._interrupted = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._member.flights.add(self)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._member.flights.discard(self)
        if self._interrupted and self._task.uncancel() <= self._cancelling:
            raise TakenOut(f"{self._member.name} was taken out: {self._member.out}") from error

    def interrupt(self) -> None:
        """End it from outside."""
        if not self._interrupted:
            self._interrupted = True
            self._task.cancel()


Arrival = tuple[int, int]
"""A request's place in the queue: its step, and the order in which it came."""
# A waiting request: its place, its session, and whom it gets.
_Ticket = tuple[Arrival, str, "asyncio.Future[Member]"]


class Dispatcher:
    """Gives each request a server, at most ``max_requests`` at once each.

    A session stays with the server that has its context cached; a new one goes to the server with
    the fewest requests. Whoever cannot have a server waits, and a place that becomes free goes to
    the lowest step of those it suits, and there to the one that came first. So nobody starves: what
    runs ahead waits for the steps before it, which end.
    """

    def __init__(self, members: Sequence[Member], max_requests: int) -> None:
        self.members = members
        self._max_requests = max_requests
        self._home: dict[str, Member] = {}
        self._waiting: list[_Ticket] = []
        self._arrivals = itertools.count()
        self._open = True

    @property
    def num_waiting(self) -> int:
        """Requests that have no server yet."""
        return len(self._waiting) + sum(len(member.waiting) for member in self.members)

    def arrive(self, step: int = 0) -> Arrival:
        """A place in the queue, for all tries of one request."""
        return step, next(self._arrivals)

    async def take(self, arrival: Arrival, session: str) -> Member:
        """A place at a server, to be given back; waits for one."""
        member = self._choose(session) if self._open and not self._waiting else None
        if member is not None:
            self._settle(member, session)
            return member
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._enqueue((arrival, session, future))
        # What is free may suit this one although others wait for a server that is full.
        self.pump()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.give_back(future.result())
            raise

    def give_back(self, member: Member) -> None:
        """A request left the server."""
        member.in_flight -= 1
        self._serve_next(member)

    def forget(self, session: str) -> None:
        """The session's next request may go anywhere."""
        self._home.pop(session, None)

    def hold(self) -> None:
        """Give nobody a server until ``pump`` after ``let_go``."""
        self._open = False

    def let_go(self) -> None:
        """Give out servers again."""
        self._open = True
        self.pump()

    def pump(self) -> None:
        """Give out all that is free, at the servers with the fewest requests first."""
        while any(map(self._serve_next, sorted(self.members, key=lambda m: m.in_flight))):
            pass

    def dismiss(self, member: Member) -> None:
        """The member was taken out: its sessions and those that wait for it go elsewhere."""
        self._home = {s: home for s, home in self._home.items() if home is not member}
        moved, member.waiting = member.waiting, []
        for ticket in moved:
            heapq.heappush(self._waiting, ticket)
        self.pump()

    def fail_waiting(self, error: Exception) -> None:
        """Raise ``error`` in all that wait."""
        queues = (self._waiting, *(member.waiting for member in self.members))
        for _, _, future in itertools.chain(*queues):
            if not future.done():
                future.set_exception(error)
        self._waiting = []
        for member in self.members:
            member.waiting = []

    def _choose(self, session: str) -> Member | None:
        home = self._home.get(session)
        if home is not None:
            return home if home.in_flight < self._max_requests else None
        free = [m for m in self.members if m.out is None and m.in_flight < self._max_requests]
        return min(free, key=lambda member: member.in_flight, default=None)

    def _enqueue(self, ticket: _Ticket) -> None:
        home = self._home.get(ticket[1])
        heapq.heappush(self._waiting if home is None else home.waiting, ticket)

    def _settle(self, member: Member, session: str) -> None:
        member.in_flight += 1
        self._home[session] = member

    def _serve_next(self, member: Member) -> bool:
        """Give a free place to the first of those it suits; False = to nobody."""
        if not (self._open and member.out is None and member.in_flight < self._max_requests):
            return False
        while queues := [queue for queue in (member.waiting, self._waiting) if queue]:
            _, session, future = heapq.heappop(min(queues, key=lambda queue: queue[0][0]))
            if not future.done():
                self._settle(member, session)
                future.set_result(member)
                return True
        return False
