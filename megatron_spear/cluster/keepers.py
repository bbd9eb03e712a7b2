"""What keeps an engine server or an environment worker running, registered and well.

    start -> ready -> register -> watch --dead or hung--> unregister, end what is left of it
      ^                                                              |
      +----- after a pause that grows, within the budget ------------+

The trainer sees a registration come and go, and gives whoever comes the present weights first.
"""

import asyncio
import itertools
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.commands import Command
from megatron_spear.cluster.processes import Child
from megatron_spear.cluster.registry import Registration, register, unregister


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """This node: its number in the job, its name and where others reach it."""

    index: int
    name: str
    address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Seconds and counts, all > 0.

    ``look_s``: between looks at processes, ``files_s``: at files that other nodes write.
    ``probe_s``: between health checks, each with ``probe_deadline_s``; ``max_misses`` in a row make
    a server hung. ``pause_s``: before the first restart, doubled up to ``max_pause_s``, and the
    first again after ``settled_s`` of good service.
    ``grace_s``: from SIGTERM to SIGKILL. ``signal_s``: between requests to the ranks to stop.
    ``lock_s``: longest wait for a run that another process still holds, ``meet_s`` for the address
    where all ranks meet, which comes after it. ``linger_s``: how long others'
    ranks may go on, and say why they end, after the attempt has failed.
    """

    look_s: float = 0.5
    files_s: float = 2.0
    probe_s: float = 10.0
    probe_deadline_s: float = 20.0
    max_misses: int = 4
    pause_s: float = 1.0
    max_pause_s: float = 60.0
    settled_s: float = 300.0
    grace_s: float = 10.0
    signal_s: float = 3.0
    lock_s: float = 120.0
    meet_s: float = 300.0
    linger_s: float = 15.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """What all processes of a node have in common; ``environment`` is the supervisor's own."""

    attempt: Attempt
    node: Node
    times: Times
    say: Callable[[str], None]
    environment: Mapping[str, str]

    def start(
        self, command: Command, role: str, index: int, dies_by: signal.Signals = signal.SIGKILL
    ) -> Child:
        """Start a process with its log, and note it for the sweep of a later attempt."""
        log = self.attempt.log(self.node.name, role, index)
        environment = {**self.environment, **command.environment}
        child = Child(command.line, environment, log, dies_by=dies_by)
        try:
            child.note(self.attempt.pid_file(self.node.name, role, index))
        except OSError as error:
            self.say(f"{role} {index}: a later attempt will not know of it: {error}")
        return child

    def say_end(self, name: str, why: str, child: Child) -> None:
        """Say why a process is of no use any more, with what it said last."""
        words = child.last_words()
        self.say("\n    ".join([f"{name} {why}", *words, f"(its log: {child.log})"]))


class NotReady(Exception):
    """A process that did not become ready, and why."""


class Kept(Protocol):
    """One kind of process that is kept. ``max_restarts`` None is no limit; ``dies_by`` is what the
    process gets when the supervisor dies."""

    role: str
    index: int
    max_restarts: int | None
    dies_by: signal.Signals

    async def command(self) -> Command:
        """The command line of the next start; may wait for what it needs."""
        ...

    async def ready(self, child: Child) -> str:
        """Wait until it can be reached, and give its address; NotReady if that does not come."""
        ...

    async def unwell(self, child: Child) -> str:
        """Wait until it is of no use any more, and say why."""
        ...


async def keep(kept: Kept, site: Site) -> None:
    """Keep a process until this is cancelled or its restarts are spent; nothing of it is left
    behind."""
    name, times = f"{kept.role} {kept.index}", site.times
    pause_s = times.pause_s
    for launch in itertools.count():
        began = time.monotonic()
        await _keep_once(kept, site, launch)
        if launch == kept.max_restarts:
            site.say(f"{name} stays away: it has been started again {launch} times")
            return
        if time.monotonic() - began > times.settled_s:
            pause_s = times.pause_s
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, times.max_pause_s)


async def _keep_once(kept: Kept, site: Site, launch: int) -> None:
    """From a start to the end of that process and of all that it started. What goes wrong costs
    this process alone."""
    name = f"{kept.role} {kept.index}"
    try:
        child = site.start(await kept.command(), kept.role, kept.index, kept.dies_by)
    except (NotReady, OSError) as error:
        site.say(f"{name} cannot be started: {error}")
        return
    again = f" again (restart {launch})" if launch else ""
    site.say(f"{name} started{again}: pid {child.pid}, log {child.log}")
    try:
        address = await kept.ready(child)
        registration = Registration(
            role=kept.role,
            index=kept.index,
            address=address,
            node=site.node.name,
            pid=child.pid,
            launch=launch,
        )
        register(site.attempt.registry, registration)
        site.say(f"{name} registered at {address}")
        site.say_end(name, await kept.unwell(child), child)
    except (NotReady, OSError) as error:
        site.say_end(name, str(error), child)
    finally:
        with suppress(OSError):
            unregister(site.attempt.registry, kept.role, kept.index)
        await child.end(site.times.grace_s)
