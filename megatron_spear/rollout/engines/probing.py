"""Health checks of a fleet's servers: finds the dead and the stale, and those that return.

A server that stopped to answer and answers again with the label that it was given is the same
process with the same weights, and serves again; one that was restarted has another label.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.dispatch import Member
from megatron_spear.rollout.engines.http import ServerLost
from megatron_spear.rollout.engines.labels import ForeignLabel, Labels, OtherTrainer
from megatron_spear.rollout.engines.roster import Roster

# A server under load may be slow to answer, or we to hear it; a refused connection needs no second
# look.
_MISSES = 3


class Prober:
    """Looks after ``members`` from ``start`` to ``close``: takes those out of ``roster`` that serve
    and should not, and calls ``take_back`` for one that was lost and still has its label.

    Servers are asked every ``probe_s``; those that do not answer at doubled times up to
    ``max_probe_s``. One that is lost again and again before it has answered a request is taken back
    after times that grow in the same way.
    """

    def __init__(
        self,
        members: Sequence[Member],
        labels: Labels,
        roster: Roster,
        take_back: Callable[[Member], Awaitable[None]],
        *,
        probe_s: float,
        max_probe_s: float,
    ) -> None:
        self.max_context = 0
        self._members = members
        self._labels = labels
        self._roster = roster
        self._take_back = take_back
        self._probe_s = probe_s
        self._max_probe_s = max_probe_s
        self._tasks: dict[Member, asyncio.Task[None]] = {}

    async def start(self, *, wait_s: float) -> None:
        """See ``Fleet.start``; ``max_context`` is then the least of those that answered."""
        await asyncio.gather(*(self._await_first_answer(m, wait_s) for m in self._members))
        contexts = [m.info.max_context for m in self._members if m.info is not None]
        if not contexts:
            reasons = "; ".join(f"{m.name}: {m.out}" for m in self._members)
            raise EngineError(f"no engine server answered within {wait_s:g} s. {reasons}")
        self.max_context = min(contexts)
        for member in self._members:
            self.look_after(member)

    def look_after(self, member: Member) -> None:
        """Look at one more server from now on."""
        self._tasks[member] = asyncio.create_task(self._watch(member))

    async def forget(self, member: Member) -> None:
        """Look at a server no longer."""
        task = self._tasks.pop(member)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def probe_all(self) -> None:
        """Look at all servers now."""
        await asyncio.gather(*(self.probe(member) for member in self._members))

    async def probe(self, member: Member) -> bool:
        """Look at one server; False where it did not answer."""
        # Another version may be admitted while the answer is on its way.
        serving, given = member.out is None, member.version
        started_s = asyncio.get_running_loop().time()
        try:
            label = await member.server.label()
            if not serving and not member.reachable:
                member.info = await member.server.inspect()
        except EngineError as error:
            if isinstance(error, ServerLost) or member.heard_s < started_s:
                self._missed(member, error)
            return False
        member.misses = 0
        wrong = self._wrong_label(label, given, member.name)
        lost = member.lost_s is not None
        if wrong is not None and (lost or (serving and member.out is None)):
            self._roster.take_out(member, str(wrong))
        if member.out is not None:
            member.reachable = self._may_update(member, wrong)
            ours = label == self._labels.label(member.version)
            if member.reachable and ours and self._rested(member, started_s):
                await self._take_back(member)
        return True

    async def close(self) -> None:
        """Look no longer."""
        for member in tuple(self._tasks):
            await self.forget(member)

    async def _await_first_answer(self, member: Member, wait_s: float) -> None:
        loop = asyncio.get_running_loop()
        end_s, pause_s = loop.time() + wait_s, 0.1
        while True:
            try:
                member.info = await member.server.inspect()
                member.reachable = True
                return
            except EngineError as error:
                member.out = str(error)
            if loop.time() + pause_s > end_s:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._probe_s)

    async def _watch(self, member: Member) -> None:
        pause_s = self._probe_s
        while True:
            await asyncio.sleep(pause_s)
            if await self.probe(member) or member.out is None:
                pause_s = self._probe_s
            else:
                pause_s = min(2 * pause_s, self._max_probe_s)

    def _missed(self, member: Member, error: EngineError) -> None:
        member.misses += 1
        if isinstance(error, ServerLost) or member.misses >= _MISSES:
            if member.out is None:
                self._roster.lose(member, str(error))
            member.reachable = False

    def _rested(self, member: Member, asked_s: float) -> bool:
        """True where a server that was lost was asked long enough after that."""
        doublings = min(member.num_lost - 1, 16)  # more than any limit needs
        rest_s = min(self._probe_s * (2**doublings - 1), self._max_probe_s)
        return member.lost_s is not None and asked_s >= member.lost_s + rest_s

    def _wrong_label(self, label: str, given: int, name: str) -> ForeignLabel | None:
        """Why a server with this label may not serve ``given``; None = it may."""
        try:
            version = self._labels.version(label, name)
        except ForeignLabel as error:
            return error
        if version < given:
            return ForeignLabel(
                f"{name} holds policy version {version} after it had been given {given}: it serves "
                "again after the next weight update"
            )
        return None

    def _may_update(self, member: Member, wrong: ForeignLabel | None) -> bool:
        """True where a server that is out may take the next weights.

        One that another run took over is left to it, but what an earlier run left behind is ours.
        """
        if isinstance(wrong, OtherTrainer) and member.version >= 0:
            member.out = str(wrong)
            return False
        if member.info is not None and member.info.max_context < self.max_context:
            member.out = (
                f"its context of {member.info.max_context} tokens is below the {self.max_context} "
                "of the other servers"
            )
            return False
        return member.info is not None
