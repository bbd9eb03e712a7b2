"""What a supervisor is told by signals."""

import signal
from types import FrameType


class StopSignals:
    """``reason``: the first of SIGINT, SIGTERM and SIGUSR1 that came, empty before; the run is to
    be saved and stopped. ``at_once``: a second SIGINT came, and nothing is to be waited for."""

    def __init__(self) -> None:
        self.reason = ""
        self.at_once = False
        self._interrupts = 0

    def request(self, number: int) -> None:
        """Take note of a signal."""
        if number == signal.SIGINT:
            self._interrupts += 1
            self.at_once = self._interrupts > 1
        self.reason = self.reason or signal.Signals(number).name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(number)


def install() -> StopSignals:
    """Signals from now on; call it in the main thread, before anything slow is imported."""
    stop = StopSignals()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop._handle)
    return stop
