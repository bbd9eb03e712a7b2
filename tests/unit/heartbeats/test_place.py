"""Where a thread stands: its own line, and the collective it waits in."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_spear.heartbeats.place import place_of, place_of_frame


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


@pytest.mark.parametrize("file", ["hook.py", "/venv/site-packages/torch/distributed/store.py"])
def test_a_frame_without_a_line_is_at_its_function(file: str) -> None:
    """As another thread's is for a moment now and then (``f_lineno`` is None)."""
    code = SimpleNamespace(co_filename=file, co_name="work", co_firstlineno=7)
    frame: Any = SimpleNamespace(f_code=code, f_lineno=None, f_back=None)
    place = place_of_frame(frame)
    assert place.at == ("hook.py:7 in work" if file == "hook.py" else "")


def test_needs_no_torch() -> None:
    code = "import sys, megatron_spear.heartbeats.heart; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
