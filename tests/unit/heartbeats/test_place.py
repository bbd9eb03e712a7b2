"""Where a thread stands: its own line, and the collective it waits in."""

import subprocess
import sys
import threading
import time

from megatron_spear.heartbeats.place import place_of


def sleep_here(ready: threading.Event, go: threading.Event) -> None:
    ready.set()
    go.wait(10.0)


def test_the_line_is_the_own_one_not_pythons() -> None:
    ready, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=sleep_here, args=(ready, go))
    thread.start()
    ready.wait(10.0)
    time.sleep(0.05)
    assert thread.ident is not None
    place = place_of(thread.ident)
    go.set()
    thread.join()
    assert place.at.startswith("test_place.py:") and place.at.endswith("in sleep_here")
    assert place.waits_in == ""
    assert place_of(thread.ident).at == ""


def test_needs_no_torch() -> None:
    code = "import sys, megatron_spear.heartbeats.heart; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
