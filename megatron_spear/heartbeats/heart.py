"""The heart of a rank: knows what the process does, writes it down, and watches that it moves.

    main thread, rollout thread   begin("step 3"), phase("train"), waiting_for("..."), beat()
    thread "heartbeat"            every period: writes this rank's file, reads the controller's
    thread "watchdog"             nothing moved for the limit: stacks, who is behind, exit 70

A rank that waits for others has all the time in the world while the controller moves: rollouts may
take longer than the limit. Code anywhere calls the functions of this module; where no heart beats
(tests, tools) they do nothing.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_spear.deadlines import Watchdog
from megatron_spear.heartbeats.look import LOOK_S, look_twice, within
from megatron_spear.heartbeats.place import Place, place_of
from megatron_spear.heartbeats.record import Hang, Heartbeat, HeartbeatFolder
from megatron_spear.heartbeats.report import Looks, who_is_behind, who_is_lost

log = logging.getLogger(__name__)

_SHORTEST_S, _LONGEST_S = 0.1, 5.0
_PERIODS_A_LIMIT = 50
_FIRST_RANKS = 8
"""Besides these only the first rank of each node reads everybody's heartbeat at the end."""


class Heart:
    """What this rank does, told to the others, with a watchdog of ``limit_s`` seconds.

    ``folder`` is None where nobody shares one: then there is the watchdog alone. Example::

        with Heart(1800.0, rank=1, world_size=4, folder=HeartbeatFolder(path, launch)):
            begin("step 3")
            with phase("train"):
                ...
    """

    def __init__(
        self,
        limit_s: float,
        *,
        rank: int,
        world_size: int,
        folder: HeartbeatFolder | None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._rank, self._world_size, self._folder = rank, world_size, folder
        self._host, self._main = socket.gethostname(), threading.get_ident()
        self.period_s = min(max(limit_s / _PERIODS_A_LIMIT, _SHORTEST_S), _LONGEST_S)
        self._task, self._phase, self._wait, self._ended = "the start", "", "", ""
        self._beats = self._moves = 0
        self._moved_at = self._controller_moved_at = time.monotonic()
        self._controller_moves = -1
        self._hang: Hang | None = None
        self._hang_before: Hang | None = None
        self._at_expiry: Heartbeat | None = None
        self._warned = False
        self._limit_s = limit_s
        self._watchdog = Watchdog(limit_s, "the start", end=end, others=self)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heart":
        global _heart
        assert _heart is None, "a process has one heart"
        _heart = self
        self._watchdog.__enter__()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        global _heart
        _heart = None
        self._ended = "well" if kind is None else f"{kind.__name__}: {error}"
        self._done.set()
        self._watchdog.__exit__()
        self._thread.join(self.period_s)  # a file system that stands still keeps nobody

    # What the process does.

    def move(self, task: str | None = None) -> None:
        """Something was done; ``task`` is what comes next.

        From another thread it counts only while the main thread does not wait for other ranks:
        rollouts that run ahead say nothing of a collective that hangs.
        """
        if threading.get_ident() != self._main and self.place().waits_in:
            return
        if task is not None:
            self._task, self._phase = task, ""
        self._moves += 1
        self._moved_at = time.monotonic()
        self._watchdog.beat(self._doing())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the task; both ends are movements."""
        before, self._phase = self._phase, name
        self.move()
        try:
            yield
        finally:
            self._phase = before
            self.move()

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """A wait for other ranks; its end is a movement."""
        before, self._wait = self._wait, what
        try:
            yield
        finally:
            self._wait = before
        self.move()

    @property
    def now(self) -> tuple[str, str]:
        """The task and the phase of it."""
        return self._task, self._phase

    def place(self) -> Place:
        """Where the main thread is."""
        found = place_of(self._main)
        return Place(at=found.at, waits_in=self._wait or found.waits_in)

    def _doing(self) -> str:
        return ": ".join(part for part in (self._task, self._phase) if part)

    # The watchdog's questions.

    def deadline(self, own: float) -> float:
        """Until when this rank may stand still, ``own`` being its own movement and the limit."""
        if self._hang is not None and self._hang.rank != self._rank:
            return 0.0
        if self._rank and self.place().waits_in:
            return max(own, self._controller_moved_at + self._limit_s)
        return own

    def expired(self) -> str:
        """Why the watchdog has expired. From now on this rank's heartbeat tells of this moment,
        whatever the end of other ranks does to it."""
        self._at_expiry = self._now()
        if self._hang is not None:
            return f"the watchdog of rank {self._hang.rank} (pid {self._hang.pid}) has expired"
        return f"nothing moved for {time.monotonic() - self._moved_at:.0f} s"

    def standing(self) -> str:
        """This rank and where it stands."""
        return self._now().where

    def last_words(self) -> list[str]:
        """Who is behind; the others have had the time to say theirs then."""
        folder = self._folder
        if folder is None or self._world_size == 1:
            return []
        token = os.urandom(8).hex()
        own = Hang(rank=self._rank, host=self._host, pid=os.getpid(), token=token)
        first = self._hang is None
        if first:
            self._hang = own
            within(LOOK_S, lambda: folder.announce(own))
        if self._rank >= _FIRST_RANKS and int(os.environ.get("LOCAL_RANK", "0")):
            time.sleep(self._gap_s)
            return ["the first rank of this node tells who is behind"]
        lines = who_is_behind(self._two_looks(folder)) or ["no heartbeat of the others can be read"]
        if first:
            time.sleep(self._gap_s)  # the others are to find this process, and say their own
        return lines

    def knows_of_a_hang(self) -> bool:
        """Whether a watchdog has expired: this rank's, or that of another that said so."""
        folder = self._folder
        if self._hang is None and folder is not None:
            within(LOOK_S, self._look_for_a_hang)
        return self._at_expiry is not None or self._hang is not None

    def lost_ranks(self) -> list[str]:
        """After a collective has failed: who is not there any more; takes some periods."""
        if self._folder is None or self._world_size == 1:
            return []
        return who_is_lost(self._two_looks(self._folder))

    def expire(self) -> None:
        """End the process now, as the watchdog does it."""
        self._watchdog.expire()

    @property
    def _gap_s(self) -> float:
        """Every rank that lives has written once more after this."""
        return 2 * self.period_s + 1.0

    def _two_looks(self, folder: HeartbeatFolder) -> Looks:
        return look_twice(
            folder,
            rank=self._rank,
            world_size=self._world_size,
            host=self._host,
            gap_s=self._gap_s,
            expired=self._hang.rank if self._hang is not None else None,
        )

    # The file.

    def _now(self) -> Heartbeat:
        if self._at_expiry is not None:
            return replace(self._at_expiry, beats=self._beats)
        place = self.place()
        return Heartbeat(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            beats=self._beats,
            moves=self._moves,
            still_s=round(time.monotonic() - self._moved_at, 1),
            doing=self._doing(),
            at=place.at,
            waits_in=place.waits_in,
            ended=self._ended,
        )

    def _beat_on(self) -> None:
        if self._folder is not None:  # what an earlier launch left, and the controller has not seen
            self._hang_before = self._folder.hang()
        while True:
            last = self._done.wait(self.period_s if self._beats else 0.0)
            self._beat()
            if last:
                return

    def _beat(self) -> None:
        folder = self._folder
        self._beats += 1
        if folder is None:
            return
        try:
            folder.write(self._now())
        except FileNotFoundError:
            pass  # the controller has not made it yet
        except OSError as error:
            if not self._warned:
                log.warning("the heartbeat cannot be written; the run goes on: %s", error)
                self._warned = True
        self._look_for_a_hang()
        controller = folder.read(0)
        if controller is not None and controller.moves != self._controller_moves:
            self._controller_moves = controller.moves
            self._controller_moved_at = time.monotonic()

    def _look_for_a_hang(self) -> None:
        if self._hang is None and self._folder is not None:
            found = self._folder.hang()
            self._hang = found if found != self._hang_before else None


_heart: Heart | None = None


def begin(task: str) -> None:
    """The main thread begins something of its own, ``step 12`` say."""
    if _heart is not None:
        _heart.move(task)


def beat() -> None:
    """Something moved: a turn, a micro-batch, a file. Cheap; from any thread."""
    if _heart is not None:
        _heart.move()


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """A part of the task that the main thread has begun."""
    return contextlib.nullcontext() if _heart is None else _heart.phase(name)


def doing() -> tuple[str, str]:
    """The task that the main thread has begun and the phase of it (``step 12``, ``train``); empty
    where no heart beats."""
    return ("", "") if _heart is None else _heart.now


def waiting_for(what: str) -> contextlib.AbstractContextManager[None]:
    """A wait of the main thread for other ranks; ``what`` is waited for, ``the plan`` say."""
    return contextlib.nullcontext() if _heart is None else _heart.waiting_for(what)
