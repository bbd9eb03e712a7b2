"""Which servers of a fleet serve, which are out and why; what becomes of requests when all are."""

import asyncio
import logging
from collections.abc import Sequence

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.dispatch import Dispatcher, Member

_LOG = logging.getLogger(__name__)


class Roster:
    """``members`` and their comings and goings; ``policy_version`` is the newest admitted, -1
    before the first.

    When all are out, requests wait for at most ``all_out_s`` (not counting a pause, in which
    weights arrive); from then on ``hopeless`` is the error to raise, until one is admitted.
    """

    def __init__(
        self, members: Sequence[Member], dispatch: Dispatcher, *, all_out_s: float
    ) -> None:
        self.members = members
        self.policy_version = -1
        self.hopeless: EngineError | None = None
        self._dispatch = dispatch
        self._all_out_s = all_out_s
        self._clock: asyncio.TimerHandle | None = None
        self._held = False

    def member(self, name: str) -> Member:
        """The server of that URL."""
        return next(member for member in self.members if member.name == name)

    def take_out(self, member: Member, why: str) -> None:
        """Send the server nothing more until it is admitted again; what is under way there goes to
        others."""
        if member.out is None:
            _LOG.warning("engine %s is taken out: %s", member.name, why)
        member.take_out(why)
        self._dispatch.dismiss(member)
        self.watch()

    def lose(self, member: Member, why: str) -> None:
        """Take out a server that serves and did not answer; it is taken back if it ``kept`` its
        weights."""
        self.take_out(member, why)
        member.lost_s = asyncio.get_running_loop().time()
        member.num_lost += 1

    def kept(self, member: Member) -> bool:
        """True where a server that was lost still holds the newest weights, if it is the same
        process: its label says so. Nobody is taken back in a pause, after which it may be other
        weights."""
        newest = member.intact and member.version == self.policy_version
        return member.lost_s is not None and newest and not self._held

    def take_back(self, member: Member) -> None:
        """Let a server serve again that was lost and ``kept`` its weights."""
        _LOG.warning(
            "engine %s serves again: it kept policy version %d", member.name, member.version
        )
        self._let_serve(member)

    def admit(self, member: Member, policy_version: int) -> None:
        """Let a server serve that holds all of ``policy_version``; see ``check_version``."""
        self.check_version(member, policy_version)
        member.version, member.intact, member.num_lost = policy_version, True, 0
        self.policy_version = policy_version
        self._let_serve(member)

    def check_version(self, member: Member, policy_version: int) -> None:
        """Raise EngineError unless the version is new to the server and not older than others'."""
        if policy_version <= member.version or policy_version < self.policy_version:
            raise EngineError(
                f"policy version {policy_version} for {member.name}, which was given "
                f"{member.version} (others {self.policy_version}); versions only go up"
            )

    def hold(self) -> None:
        """Give nobody a server, and wait for any as long as it takes, until ``let_go``."""
        self._held = True
        self._stop_clock()
        self._dispatch.hold()

    def let_go(self) -> None:
        """End ``hold``. Servers that did not get the newest version are taken out."""
        self._held = False
        for member in self.members:
            if member.out is None and member.version < self.policy_version:
                self.take_out(member, f"it did not get policy version {self.policy_version}")
        self._dispatch.let_go()
        self.watch()

    def watch(self) -> None:
        """See to it that requests do not wait for ever if all servers are out."""
        idle = self._clock is None and self.hopeless is None and not self._held
        if idle and all(member.out is not None for member in self.members):
            loop = asyncio.get_running_loop()
            self._clock = loop.call_later(self._all_out_s, self._give_up)

    def close(self) -> None:
        """Fail all requests, now and from now on."""
        self.hold()
        self.hopeless = EngineError("the engine is closed")
        self._dispatch.fail_waiting(self.hopeless)
        for member in self.members:
            member.take_out("the engine is closed")

    def situation(self) -> str:
        """Each server with what it does or why it is out."""
        return "; ".join(
            f"{m.name}: {f'{m.in_flight} requests' if m.out is None else f'out, {m.out}'}"
            for m in self.members
        )

    def _let_serve(self, member: Member) -> None:
        member.out, member.lost_s, member.reachable = None, None, True
        self.hopeless = None
        self._stop_clock()
        self._dispatch.pump()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _give_up(self) -> None:
        self._clock = None
        self.hopeless = EngineError(
            f"no engine server has served for {self._all_out_s:g} s. {self.situation()}"
        )
        self._dispatch.fail_waiting(self.hopeless)
