"""Hangs end, with the name of what was waited for; signals ask for a clean stop."""

import os
import signal
import subprocess
import sys
import textwrap
import time

from megatron_spear.deadlines import HANG_EXIT_CODE, StopFlag, Watchdog


def run(code: str, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_a_hang_is_named_and_ends_the_process() -> None:
    done = run("""
        import threading, time
        from megatron_spear.deadlines import Watchdog
        def stuck_in_the_collective():
            time.sleep(60)
        threading.Thread(target=stuck_in_the_collective, daemon=True).start()
        with Watchdog(0.2, "rank 3 of the all-reduce"):
            time.sleep(60)
    """)
    assert done.returncode == HANG_EXIT_CODE
    assert "waiting for: rank 3 of the all-reduce" in done.stderr
    assert "stuck_in_the_collective" in done.stderr


def test_a_hang_that_holds_the_interpreter_ends_too() -> None:
    done = run("""
        import ctypes
        import megatron_spear.deadlines as deadlines
        deadlines._GRACE_S = 0.2
        with deadlines.Watchdog(0.2, "a C call"):
            ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the GIL
    """)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "<string>" in done.stderr


def test_beats_keep_the_dog_quiet_and_name_the_next_wait() -> None:
    ended: list[int] = []
    with Watchdog(0.15, "first", end=ended.append) as dog:
        for _ in range(6):
            time.sleep(0.05)
            dog.beat("next")
        assert ended == []
        time.sleep(0.3)
    assert ended == [HANG_EXIT_CODE]


def test_nested_dogs_do_not_disturb_each_other() -> None:
    done = run("""
        import time
        from megatron_spear.deadlines import Watchdog
        with Watchdog(0.4, "outer"):
            with Watchdog(5.0, "inner"):
                time.sleep(0.1)
        with Watchdog(0.3, "second"):
            time.sleep(0.1)
        time.sleep(0.5)
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_first_reason_for_a_stop_stays() -> None:
    flag = StopFlag()
    assert not flag
    flag.request("SIGUSR1")
    flag.request("SIGTERM")
    assert flag
    assert flag.reason == "SIGUSR1"


_LOOP = """
    import time
    from megatron_spear.deadlines import install_stop_signals
    stop = install_stop_signals()
    print("ready", flush=True)
    try:
        while not (stop and WHEN):
            time.sleep(0.01)
        print("stopped by", stop.reason)
    except KeyboardInterrupt:
        print("interrupted after", stop.reason)
"""


def start(when: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(_LOOP.replace("WHEN", when))
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_each_signal_stops_cleanly() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        child = start("True")
        os.kill(child.pid, getattr(signal, name))
        out, err = child.communicate(timeout=10)
        assert (child.returncode, out) == (0, f"stopped by {name}\n")
        assert f"{name}: stopping cleanly" in err


def test_the_second_interrupt_is_not_deferred() -> None:
    child = start("False")
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.2)
    assert child.poll() is None
    os.kill(child.pid, signal.SIGINT)
    out, _ = child.communicate(timeout=10)
    assert out == "interrupted after SIGINT\n"


def test_a_second_interrupt_that_gets_lost_ends_the_process_all_the_same() -> None:
    code = """
        import time
        from megatron_spear import deadlines
        deadlines._AT_ONCE_S = 0.3
        deadlines.install_stop_signals()
        print("ready", flush=True)
        while True:
            try:
                time.sleep(10.0)
            except KeyboardInterrupt:
                pass
    """
    pipe = subprocess.PIPE
    line = [sys.executable, "-c", textwrap.dedent(code)]
    child = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.2)
    _, err = child.communicate(timeout=10)
    assert child.returncode == 130 and "did not stop by itself" in err


def test_needs_no_torch() -> None:
    code = "import sys, megatron_spear.deadlines; sys.exit('torch' in sys.modules)"
    assert run(code).returncode == 0
