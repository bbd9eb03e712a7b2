"""A rollout engine over HTTP servers: who serves, what is sent again, what is given up.

    generate -> dispatch: a server -> draw -> Generation
                   ^                    |
                   +--- sent again -----+  server lost, busy, not ours any more, or a pause

    serving --lost, stale, foreign, failed an update--> out --answers again--> reachable
       ^                                                                          |
       +---------------- admitted with a whole new set of weights ----------------+

A server that was away holds weights that nobody vouches for: it serves again only after an update.
"""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import Generation, GenerationRequest, PauseMode
from megatron_spear.rollout.engines.dispatch import Dispatcher, Flight, Member
from megatron_spear.rollout.engines.drawing import Aborted, check_tokens, draw
from megatron_spear.rollout.engines.http import ServerBusy, ServerLate, ServerLost
from megatron_spear.rollout.engines.labels import ForeignLabel, Labels
from megatron_spear.rollout.engines.probing import Prober
from megatron_spear.rollout.engines.server import Answer, EngineServer
from megatron_spear.types import VersionSpan

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetLimits:
    """Times and counts, all > 0.

    ``deadline_s``: longest generation, waiting for a server included. ``all_out_s``: longest wait
    for any server when all are out. ``probe_s``: time between health checks, which doubles for a
    server that does not answer up to ``max_probe_s``. ``max_requests``: in flight on one server.
    ``max_tries``: servers that fail one request before it is given up. ``busy_s``: wait before a
    busy server's request is sent again, doubled each time.
    """

    deadline_s: float
    max_requests: int
    all_out_s: float = 60.0
    probe_s: float = 5.0
    max_probe_s: float = 60.0
    max_tries: int = 4
    busy_s: float = 0.5


class Fleet:
    """A ``RolloutEngine`` over servers of one model; ``vocab_size`` bounds the token ids.

    All methods belong to one event loop; ``fleet_updates.FleetUpdates`` is the side for the thread
    that trains. Call ``start`` first. No server serves before ``admit``.
    """

    def __init__(
        self,
        servers: Sequence[EngineServer],
        *,
        vocab_size: int,
        limits: FleetLimits,
        labels: Labels | None = None,
    ) -> None:
        self.policy_version = -1
        self.labels = labels or Labels()
        self.members = [Member(server) for server in servers]
        self._vocab_size = vocab_size
        self._limits = limits
        self._dispatch = Dispatcher(self.members, limits.max_requests)
        self._prober = Prober(
            self.members,
            self.labels,
            self.take_out,
            probe_s=limits.probe_s,
            max_probe_s=limits.max_probe_s,
        )
        self._numbers = itertools.count()
        self._errands: set[asyncio.Task[None]] = set()
        self._going = True
        self._closed = False
        self._hopeless: EngineError | None = None
        self._all_out: asyncio.TimerHandle | None = None

    @property
    def max_context(self) -> int:
        """The least of the servers' (see ``start``)."""
        return self._prober.max_context

    async def start(self, *, wait_s: float) -> None:
        """Wait until every server answers, at most ``wait_s``; then go on with those that do.

        Raises EngineError where none does, naming each. From now on servers are looked after.
        """
        await self._prober.start(wait_s=wait_s)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Draw one generation; see ``RolloutEngine``.

        Raises EngineError for a malformed request or one that a server refuses; after
        ``max_tries`` servers have failed it; when no server is left; past the deadline. A call that
        is cancelled or late is ended on its server too.
        """
        if self._closed:
            raise EngineError(f"request of session {request.session!r}: the engine is closed")
        check_tokens(request, self._vocab_size)
        if len(request.token_ids) >= self.max_context:
            return _nothing(self.policy_version)
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                return await self._until_served(request)
        except TimeoutError:
            raise EngineError(
                f"generation of session {request.session!r} took more than "
                f"{self._limits.deadline_s:g} s ({self._dispatch.num_waiting} requests wait for a "
                f"server); raise rollout.engine_deadline_s, lower the load or add servers. "
                f"{self.situation()}"
            ) from None

    def release(self, session: str) -> None:
        """Forget where a session's context is cached; the servers drop it when room is short."""
        self._dispatch.forget(session)

    async def pause(self, mode: PauseMode) -> None:
        """Stop drawing everywhere; see ``RolloutEngine``. A server that cannot is taken out."""
        self._going = False
        self._dispatch.hold()
        self._stop_clock()
        await asyncio.gather(*(self._pause(m, mode) for m in self.members if m.out is None))

    async def resume(self) -> None:
        """Go on drawing with the servers that hold the newest weights; others are taken out."""
        for member in self.members:
            if member.out is None and member.version < self.policy_version:
                self.take_out(member, f"it did not get policy version {self.policy_version}")
        await asyncio.gather(*(self._resume(m) for m in self.members if m.paused))
        self._going = True
        self._dispatch.let_go()
        self._start_clock()

    async def close(self) -> None:
        """Fail what waits or is under way, and drop all connections."""
        self._closed = True
        self._stop_clock()
        await self._prober.close()
        self._dispatch.hold()
        self._dispatch.fail_waiting(EngineError("the engine is closed"))
        for member in self.members:
            member.take_out("the engine is closed")
        # Those under way come to their end, and hand over the aborts that are still to be sent.
        await asyncio.sleep(0)
        for task in tuple(self._errands):
            task.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        await asyncio.gather(*(member.server.close() for member in self.members))

    async def reachable(self) -> list[Member]:
        """Servers that may take the next weights, looked at now."""
        await self._prober.probe_all()
        return [member for member in self.members if member.reachable]

    def take_out(self, member: Member, why: str) -> None:
        """Send the server nothing more until it is admitted again."""
        if member.out is None:
            _LOG.warning("engine %s is taken out: %s", member.name, why)
        member.take_out(why)
        self._dispatch.dismiss(member)
        self._start_clock()

    async def admit(self, member: Member, policy_version: int) -> None:
        """Let a server serve that holds all of ``policy_version``.

        Raises EngineError for a version at or below the one it had, or below the fleet's.
        """
        self.check_version(member, policy_version)
        if self._going and member.paused:
            await self._resume(member)
        member.out, member.version, member.reachable = None, policy_version, True
        self.policy_version = policy_version
        self._hopeless = None
        self._stop_clock()
        self._dispatch.pump()

    def check_version(self, member: Member, policy_version: int) -> None:
        """Raise EngineError unless the version is new to the server and not older than others'."""
        if policy_version <= member.version or policy_version < self.policy_version:
            raise EngineError(
                f"policy version {policy_version} for {member.name}, which was given "
                f"{member.version} (others {self.policy_version}); versions only go up"
            )

    def member(self, name: str) -> Member:
        """The server of that URL."""
        return next(member for member in self.members if member.name == name)

    def situation(self) -> str:
        """Each server with what it does or why it is out."""
        return "; ".join(
            f"{m.name}: {f'{m.in_flight} requests' if m.out is None else f'out, {m.out}'}"
            for m in self.members
        )

    async def _until_served(self, request: GenerationRequest) -> Generation:
        arrival, failures, busy_s = self._dispatch.arrive(), list[str](), self._limits.busy_s
        while len(failures) < self._limits.max_tries:
            if self._closed or self._hopeless is not None:
                raise self._hopeless or EngineError("the engine is closed")
            member = await self._dispatch.take(arrival, request.session)
            try:
                return await self._draw(member, request)
            except Aborted as error:
                # By a pause of ours, which holds the dispatcher; by somebody else: a failed try.
                if self._going:
                    failures.append(str(error))
            except (ServerLost, ForeignLabel) as error:
                failures.append(str(error))
                if member.out is None:
                    self.take_out(member, str(error))
            except (ServerBusy, ServerLate) as error:
                failures.append(str(error))
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

        async def ask(token_ids: list[int], max_new_tokens: int) -> Answer:
            nonlocal rid
            rid = f"{self.labels.launch}-{next(self._numbers)}"
            return await member.server.generate(request, token_ids, max_new_tokens, rid)

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
            if isinstance(error, (asyncio.CancelledError, ServerLate)) or member.out is not None:
                self._abort_later(member, rid)
            raise

    def _abort_later(self, member: Member, rid: str) -> None:
        """End a request on its server, while our caller goes on."""

        async def abort() -> None:
            try:
                await member.server.abort(rid)
            except EngineError as error:
                _LOG.debug("request %s was not ended on %s: %s", rid, member.name, error)

        task = asyncio.create_task(abort())
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _pause(self, member: Member, mode: PauseMode) -> None:
        member.paused = True
        try:
            await member.server.pause(mode)
        except EngineError as error:
            self.take_out(member, f"it did not pause: {error}")

    async def _resume(self, member: Member) -> None:
        try:
            await member.server.resume()
            member.paused = False
        except EngineError as error:
            if member.out is None:
                self.take_out(member, f"it did not go on after a pause: {error}")

    def _start_clock(self) -> None:
        """When all are out, those that wait do so for a bounded time."""
        if self._all_out is None and self._going and all(m.out is not None for m in self.members):
            loop = asyncio.get_running_loop()
            self._all_out = loop.call_later(self._limits.all_out_s, self._give_up)

    def _stop_clock(self) -> None:
        if self._all_out is not None:
            self._all_out.cancel()
            self._all_out = None

    def _give_up(self) -> None:
        self._hopeless = EngineError(
            f"no engine server has served for {self._limits.all_out_s:g} s. {self.situation()}"
        )
        self._dispatch.fail_waiting(self._hopeless)


def _nothing(policy_version: int) -> Generation:
    """The answer where the prompt fills the context."""
    return Generation(
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        finish_reason="context",
        versions=(VersionSpan(policy_version, 0),),
    )
