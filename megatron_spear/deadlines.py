"""Deadlines: nothing waits for ever, and a hang says who was waited for before the process ends.

``Watchdog`` for what cannot be given a timeout of its own (a collective, a C call); ``StopFlag``
for a clean stop on a signal. Install the signals before torch is imported.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Protocol

HANG_EXIT_CODE = 70
"""Exit status of a process that a watchdog ended."""

_GRACE_S = 5.0
_LAST_WORDS_S = 45.0
"""Longest that an expired watchdog may take to say who is behind."""
_LOOK_S = 1.0
_AT_ONCE_S = 10.0
_ERROR_FD = 2


class Others(Protocol):
    """What a watchdog asks about the other ranks of a run; ``heartbeats.heart.Heart`` is one."""

    def deadline(self, own: float) -> float:
        """Until when, in ``time.monotonic``, this process may wait; ``own`` by its own beats."""
        ...

    def expired(self) -> str:
        """Told that the watchdog has expired; gives why."""
        ...

    def standing(self) -> str:
        """What this process does."""
        ...

    def last_words(self) -> Sequence[str]:
        """Lines that say which ranks are behind; takes a while, but not for ever."""
        ...


class Watchdog:
    """Ends the process when a wait lasts longer than ``limit_s`` seconds.

    On expiry it writes who was waited for and the stacks of all threads to stderr and exits with
    ``HANG_EXIT_CODE``, without cleaning up: a hung process cannot. ``beat`` starts the time anew.
    Should a C call hold the interpreter, faulthandler's own thread ends the process 5 s later.
    ``others`` know more than the process itself: whether the ranks it waits for move, and which of
    them does not.

    Example::

        with Watchdog(600.0, "step 12: all-reduce of 4 ranks") as dog:
            for micro_batch in batch:
                train(micro_batch)
                dog.beat("micro-batch of the next rank")
    """

    def __init__(
        self,
        limit_s: float,
        name: str,
        *,
        end: Callable[[int], None] = os._exit,
        others: Others | None = None,
    ) -> None:
        assert limit_s > 0.0, "a deadline is positive"
        self._limit_s = limit_s
        self._waiting_for = name
        self._end, self._others = end, others
        self._own_deadline = 0.0
        self._last_words_until: float | None = None
        self._expiring = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._done.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        _backstop.add(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        _backstop.remove(self)
        assert self._thread is not None
        self._thread.join()

    @property
    def deadline(self) -> float:
        """``time.monotonic`` at which the wait is over."""
        if self._last_words_until is not None:
            return self._last_words_until
        if self._others is not None:
            return self._others.deadline(self._own_deadline)
        return self._own_deadline

    def beat(self, waiting_for: str | None = None) -> None:
        """Something moved: the limit counts from now, for what is waited for next."""
        if waiting_for is not None:
            self._waiting_for = waiting_for
        self._own_deadline = time.monotonic() + self._limit_s

    def _watch(self) -> None:
        while not self._done.wait(min(self._left(), self._limit_s / 4, _LOOK_S)):
            if self._left() == 0.0:
                self.expire()
                return
            _backstop.arm()

    def _left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def expire(self) -> None:
        """End the process now, and say why; a second caller waits for that."""
        if not self._expiring.acquire(blocking=False):
            time.sleep(_LAST_WORDS_S)
        self._last_words_until = time.monotonic() + _LAST_WORDS_S
        _backstop.arm()
        why, doing = f"nothing moved for {self._limit_s:g} s", f"waiting for: {self._waiting_for}"
        if self._others is not None:
            why, doing = self._others.expired(), f"in: {self._others.standing()}"
        _say(
            f"\nwatchdog: {why}; pid {os.getpid()} was {doing}",
            f"watchdog: stacks of all threads follow; exit status {HANG_EXIT_CODE}",
        )
        faulthandler.dump_traceback(file=_ERROR_FD, all_threads=True)
        if self._others is not None:
            _say(*(f"watchdog: {line}" for line in self._others.last_words()))
        self._end(HANG_EXIT_CODE)


def _say(*lines: str) -> None:
    """Write past Python's own streams, whose locks may be held."""
    for line in lines:
        os.write(_ERROR_FD, f"{line}\n".encode())


class _Backstop:
    """faulthandler's one timer of the process, kept a little behind the earliest watchdog."""

    def __init__(self) -> None:
        self._dogs: set[Watchdog] = set()
        self._lock = threading.Lock()

    def add(self, dog: Watchdog) -> None:
        with self._lock:
            self._dogs.add(dog)
        self.arm()

    def remove(self, dog: Watchdog) -> None:
        with self._lock:
            self._dogs.discard(dog)
        self.arm()

    def arm(self) -> None:
        with self._lock:
            faulthandler.cancel_dump_traceback_later()
            if self._dogs:
                left = min(dog.deadline for dog in self._dogs) - time.monotonic()
                limit_s = max(left, 0.0) + _GRACE_S
                faulthandler.dump_traceback_later(limit_s, file=_ERROR_FD, exit=True)


_backstop = _Backstop()


class StopFlag:
    """Set once a clean stop was asked for; the loop looks at it between steps.

    Example: ``if stop: save(); raise StopRequested(stop.reason)``.
    """

    def __init__(self) -> None:
        self._reason = ""

    def __bool__(self) -> bool:
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """What asked for the stop, ``SIGTERM`` say; empty while nothing did."""
        return self._reason

    def request(self, reason: str) -> None:
        """Ask for a clean stop; the first reason stays."""
        self._reason = self._reason or reason


def _end_soon() -> None:
    """End the process unless it ends before by itself."""
    time.sleep(_AT_ONCE_S)
    os.write(_ERROR_FD, b"\nit did not stop by itself; ended\n")
    os._exit(128 + signal.SIGINT)


def install_stop_signals(*, announce: bool = True) -> StopFlag:
    """A flag that SIGINT, SIGTERM and SIGUSR1 set; a second SIGINT raises KeyboardInterrupt.

    Should that be lost (in a finalizer, or behind a C call), the process ends 10 s later all the
    same, with status 130.

    Call it in the main thread, before torch is imported. ``announce`` answers the first signal with
    a line on stderr, so that Ctrl-C does not look ignored while a step ends.
    """
    flag = StopFlag()
    interrupts = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            interrupts += 1
            if interrupts > 1:
                threading.Thread(target=_end_soon, name="at-once", daemon=True).start()
                raise KeyboardInterrupt
        if announce and not flag:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            os.write(_ERROR_FD, f"\n{name}: stopping cleanly after this step{again}\n".encode())
        flag.request(name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handle)
    return flag
