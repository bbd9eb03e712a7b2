"""A rollout engine over HTTP servers: who serves, what is sent again, what is given up.

    generate -> dispatch: a server -> draw -> Generation
                   ^                    |
                   +--- sent again -----+  server lost, busy, not ours any more, or a pause

    serving --lost, stale, foreign, failed an update--> out --answers again--> reachable
       ^ ^                                               |                        |
       | +-- taken back: lost alone, its label is ours --+                        |
       +---------------- admitted with a whole new set of weights ----------------+

A server that was away and has the label it was given is the process that it was, with its weights,
unless an update was begun on it meanwhile. Of any other nobody knows what it holds: it serves again
only after an update. One that joins later (``joining``) does so at an update too.
"""

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import Generation, GenerationRequest, PauseMode
from megatron_spear.rollout.engines.dispatch import Dispatcher, Flight, Member, TakenOut
from megatron_spear.rollout.engines.drawing import Aborted, check_tokens, draw
from megatron_spear.rollout.engines.http import (
    RequestRefused,
    ServerBusy,
    ServerLost,
    Unanswered,
)
from megatron_spear.rollout.engines.http_connection import allow_connections
from megatron_spear.rollout.engines.joining import Joining
from megatron_spear.rollout.engines.labels import ForeignLabel, Labels
from megatron_spear.rollout.engines.probing import Prober
from megatron_spear.rollout.engines.roster import Roster
from megatron_spear.rollout.engines.server import Answer, EngineServer
from megatron_spear.types import VersionSpan

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetLimits:
    """Times and counts, all > 0.

    ``deadline_s``: longest generation, all tries included, from when it has a server first (those
    before it in the queue have deadlines of their own). ``max_requests``: in flight on one server.
    ``all_out_s``: longest wait for any server when all are out. ``probe_s``: time between health
    checks, which doubles for a server that is out and does not answer, up to ``max_probe_s``.
    ``max_tries``: failed tries after which a request is given up. ``busy_s``: wait before a busy
    server's request is sent again, doubled each time.
    """

    deadline_s: float
    max_requests: int
    all_out_s: float = 60.0
    probe_s: float = 5.0
    max_probe_s: float = 15.0
    max_tries: int = 4
    busy_s: float = 0.5


class Fleet:
    """A ``RolloutEngine`` over servers of one model; ``vocab_size`` bounds the token ids.
    ``joining`` brings in servers that come later.

    All methods belong to one event loop; ``fleet_updates.FleetUpdates`` is the side for the thread
    that trains. Call ``start`` first. No server serves before it is admitted.
    """

    def __init__(
        self,
        servers: Sequence[EngineServer],
        *,
        vocab_size: int,
        limits: FleetLimits,
        labels: Labels | None = None,
        joining: Joining | None = None,
    ) -> None:
        self.labels = labels or Labels()
        self._members = members = [Member(server) for server in servers]
        self._limits = limits
        self._joining = joining
        self._dispatch = Dispatcher(members, limits.max_requests)
        self.roster = Roster(members, self._dispatch, all_out_s=limits.all_out_s)
        self._prober = Prober(
            members,
            self.labels,
            self.roster,
            self._take_back,
            probe_s=limits.probe_s,
            max_probe_s=limits.max_probe_s,
        )
        self._vocab_size = vocab_size
        self._numbers = itertools.count()
        self._errands: set[asyncio.Task[None]] = set()
        self._num_pauses = 0
        self._going = True

    @property
    def policy_version(self) -> int:
        """The newest version that a server holds, -1 before the first."""
        return self.roster.policy_version

    @property
    def max_context(self) -> int:
        """The least of the servers' (see ``start``)."""
        return self._prober.max_context

    async def start(self, *, wait_s: float) -> None:
        """Wait until every server answers, at most ``wait_s``; then go on with those that do.

        Raises EngineError where none does, naming each, and ConfigError where the process may not
        open a connection for each request. From now on servers are looked after.
        """
        allow_connections(self._limits.max_requests * len(self.roster.members))
        await self._prober.start(wait_s=wait_s)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Draw one generation; see ``RolloutEngine``.

        Raises EngineError for a malformed request or one that a server refuses; after
        ``max_tries`` failures; when no server is left; past the deadline. A call that is cancelled
        or late is ended on its server too.
        """
        if not self.max_context:
            raise EngineError("the fleet was not started; await start() first")
        check_tokens(request, self._vocab_size)
        if len(request.token_ids) >= self.max_context:
            return _nothing(self.policy_version)
        try:
            async with asyncio.timeout(None) as deadline:
                return await self._until_served(request, deadline)
        except TimeoutError:
            raise EngineError(
                f"generation of session {request.session!r} took more than "
                f"{self._limits.deadline_s:g} s ({self._dispatch.num_waiting} requests wait for a "
                f"server); raise rollout.engine_deadline_s, lower the load or add servers. "
                f"{self.roster.situation()}"
            ) from None

    def release(self, session: str) -> None:
        """Forget where a session's context is cached; the servers drop it when room is short."""
        self._dispatch.forget(session)

    async def pause(self, mode: PauseMode) -> None:
        """Stop drawing everywhere; see ``RolloutEngine``. A server that cannot is taken out."""
        self._going = False
        self._num_pauses += 1
        self.roster.hold()
        serving = [member for member in self.roster.members if member.out is None]
        await asyncio.gather(*(self._pause(member, mode) for member in serving))

    async def resume(self) -> None:
        """Go on drawing with the servers that hold the newest weights; others are taken out."""
        paused = [member for member in self.roster.members if member.paused]
        for member in paused:
            if member.out is not None:
                self._send(self._resume(member))
        await asyncio.gather(*(self._resume(m) for m in paused if m.out is None))
        self._going = True
        self.roster.let_go()

    async def close(self) -> None:
        """Fail what waits or is under way, and drop all connections."""
        await self._prober.close()
        self.roster.close()
        # Those under way come to their end, and hand over the aborts that are still to be sent.
        await asyncio.sleep(0)
        if self._errands:
            await asyncio.wait(self._errands, timeout=1.0)
        for task in tuple(self._errands):
            task.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        await asyncio.gather(*(member.server.close() for member in self.roster.members))

    async def reachable(self) -> list[Member]:
        """Servers that may take the next weights, looked at now; those that have joined are of
        them."""
        if self._joining is not None:
            await self._joining.follow(self._members, self._prober, self._limits.max_requests)
        await self._prober.probe_all()
        return [member for member in self.roster.members if member.reachable]

    async def admit(self, member: Member, policy_version: int) -> None:
        """Let a server serve that holds all of ``policy_version``; EngineError for an old one."""
        if self._going and member.paused:
            await self._resume(member)
        self.roster.admit(member, policy_version)

    async def _until_served(
        self, request: GenerationRequest, deadline: asyncio.Timeout
    ) -> Generation:
        """The generation; sets the deadline when there is a server for it first."""
        arrival, failures, busy_s = (
            self._dispatch.arrive(request.step),
            list[str](),
            self._limits.busy_s,
        )
        while len(failures) < self._limits.max_tries:
            if self.roster.hopeless is not None:
                raise EngineError(f"request of session {request.session!r}: {self.roster.hopeless}")
            self.roster.watch()
            member = await self._dispatch.take(arrival, request.session)
            if deadline.when() is None:
                deadline.reschedule(asyncio.get_running_loop().time() + self._limits.deadline_s)
            num_pauses = self._num_pauses
            try:
                generation = await self._draw(member, request)
                member.heard_s, member.num_lost = asyncio.get_running_loop().time(), 0
                return generation
            except RequestRefused as error:
                raise EngineError(f"request of session {request.session!r}: {error}") from error
            except Aborted as error:
                # A pause may draw anew; it is a failure where somebody else ended it.
                if num_pauses == self._num_pauses:
                    failures.append(str(error))
            except TakenOut:
                pass  # no failure of this request; its deadline bounds how often
            except ServerLost as error:
                failures.append(str(error))
                if member.out is None:
                    self.roster.lose(member, str(error))
            except ForeignLabel as error:
                failures.append(str(error))
                if member.out is None:
                    self.roster.take_out(member, str(error))
            except ServerBusy as error:
                failures.append(str(error))
                self._dispatch.forget(request.session)
                # Its place is kept meanwhile, to send a busy server less.
                await asyncio.sleep(busy_s)
                busy_s *= 2
            finally:
                self._dispatch.give_back(member)
        raise EngineError(
            f"generation of session {request.session!r} failed {len(failures)} times: "
            + "; then ".join(failures)
        )

    async def _draw(self, member: Member, request: GenerationRequest) -> Generation:
        """One try at a server, ended there whenever we do not wait for its end."""
        rid = ""

        async def once(token_ids: list[int], max_new_tokens: int) -> Answer:
            nonlocal rid
            rid = f"{self.labels.launch}-{next(self._numbers)}"
            return await member.server.generate(request, token_ids, max_new_tokens, rid)

        async def ask(token_ids: list[int], max_new_tokens: int) -> Answer:
            try:
                return await once(token_ids, max_new_tokens)
            except Unanswered:
                return await once(token_ids, max_new_tokens)

        try:
            async with Flight(member):
                return await draw(
                    member.server,
                    request,
                    ask,
                    labels=self.labels,
                    oldest_version=member.version,
                    max_context=self.max_context,
                )
        except BaseException as error:
            ended_here = isinstance(error, asyncio.CancelledError | TakenOut)
            if ended_here or member.out is not None:
                self._send(self._abort(member, rid))
            raise

    async def _abort(self, member: Member, rid: str) -> None:
        try:
            await member.server.abort(rid)
        except EngineError as error:
            _LOG.debug("request %s was not ended on %s: %s", rid, member.name, error)

    def _send(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that nobody waits for."""
        task = asyncio.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _take_back(self, member: Member) -> None:
        """Let a server serve again that was lost and has its label; nothing where it may not."""
        if self.roster.kept(member) and member.paused:
            await self._resume(member)
        if self.roster.kept(member) and not member.paused:
            self.roster.take_back(member)

    async def _pause(self, member: Member, mode: PauseMode) -> None:
        member.paused = True
        try:
            await member.server.pause(mode)
        except EngineError as error:
            self.roster.take_out(member, f"it did not pause: {error}")

    async def _resume(self, member: Member) -> None:
        try:
            await member.server.resume()
            member.paused = False
        except EngineError as error:
            if member.out is None:
                self.roster.lose(member, f"it did not go on after a pause: {error}")


def _nothing(policy_version: int) -> Generation:
    """The answer where the prompt fills the context."""
    return Generation(
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        finish_reason="context",
        versions=(VersionSpan(policy_version, 0),),
    )
