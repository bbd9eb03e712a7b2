"""Deadlines: nothing waits for ever, and a hang says who was waited for before the process ends.

``Watchdog`` for what cannot be given a timeout of its own (a collective, a C call); ``StopFlag``
for a clean stop on a signal. Install the signals before torch is imported.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

HANG_EXIT_CODE = 70
"""Exit status of a process that a watchdog ended."""

_GRACE_S = 5.0
_AT_ONCE_S = 10.0
_ERROR_FD = 2


class Watchdog:
    """Ends the process when a wait lasts longer than ``limit_s`` seconds.

    On expiry it writes who was waited for and the stacks of all threads to stderr and exits with
    ``HANG_EXIT_CODE``, without cleaning up: a hung process cannot. ``beat`` starts the time anew.
    Should a C call hold the interpreter, faulthandler's own thread ends the process 5 s later.

    Example::

        with Watchdog(600.0, "step 12: all-reduce of 4 ranks") as dog:
            for micro_batch in batch:
                train(micro_batch)
                dog.beat("micro-batch of the next rank")
    """

    def __init__(self, limit_s: float, name: str, *, end: Callable[[int], None] = os._exit) -> None:
        assert limit_s > 0.0, "a deadline is positive"
        self._limit_s = limit_s
        self._waiting_for = name
        self._end = end
        self._deadline = 0.0
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
        return self._deadline

    def beat(self, waiting_for: str | None = None) -> None:
        """Something moved: the limit counts from now, for what is waited for next."""
        if waiting_for is not None:
            self._waiting_for = waiting_for
        self._deadline = time.monotonic() + self._limit_s

    def _watch(self) -> None:
        while not self._done.wait(min(self._left(), self._limit_s / 4)):
            if self._left() == 0.0:
                self._expire()
                return
            _backstop.arm()

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _expire(self) -> None:
        text = (
            f"\nwatchdog: nothing moved for {self._limit_s:g} s; pid {os.getpid()} was "
            f"waiting for: {self._waiting_for}\nwatchdog: stacks of all threads follow; "
            f"exit status {HANG_EXIT_CODE}\n"
        )
        os.write(_ERROR_FD, text.encode())
        faulthandler.dump_traceback(file=_ERROR_FD, all_threads=True)
        self._end(HANG_EXIT_CODE)


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
