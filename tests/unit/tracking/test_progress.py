"""Plain lines off a terminal, live bars on one, and never a silent minute."""

import io
import logging
import os
import pty
import subprocess
import sys
import textwrap
import time

from megatron_spear.tracking.progress import Console
from megatron_spear.tracking.speed_text import duration


def console(**options) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, **options), file


def test_plain_output_has_headings_lines_and_tables() -> None:
    screen, file = console()
    screen.phase("Warm start")
    screen.line(
        "success [0.25] on 64 games, a line that is longer than eighty characters and stays"
    )
    screen.table([("success before", "0.250"), ("[x]", "1")], title="Summary")
    screen.close()
    text = file.getvalue()
    assert text.startswith("== Warm start\nsuccess [0.25] on 64 games, a line that is longer than ")
    assert "characters and stays\n" in text
    assert "success before" in text
    assert "[x]" in text
    assert "\x1b" not in text


def test_a_plain_bar_reports_rate_and_eta_now_and_then() -> None:
    screen, file = console(line_every_s=0.05)
    with screen.bar("rollout", 8, done=2) as bar:
        for _ in range(3):
            time.sleep(0.03)
            bar.advance(1, loss=0.123456)
        bar.at(7)
    screen.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 1, "not a line for every advance"
    assert lines[0].startswith("  rollout 4/8 (50%), ")
    assert "/s, ETA " in lines[0]
    assert lines[0].endswith(", loss 0.1235")


def test_steps_off_a_terminal_are_one_plain_line_each() -> None:
    screen, file = console(line_every_s=0.0)
    with screen.steps(48, done=46) as bar:
        bar.evaluated(0, 0.25)
        for _ in range(2):
            time.sleep(0.01)
            bar.finished(
                {"rollout/success": 0.5156, "replay/rows": 24.0, "policy/entropy": 0.22912}
            )
    screen.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("  step 48/48 (100%), ")
    assert lines[1].endswith("/s, success 0.5156, replayed 24, entropy 0.2291")


def test_a_short_bar_leaves_no_line() -> None:
    screen, file = console()
    with screen.bar("rollout", 8) as bar:
        bar.advance(8)
    screen.close()
    assert file.getvalue() == ""


def test_silence_is_broken_by_a_heartbeat() -> None:
    screen, file = console(heartbeat_s=0.1)
    screen.phase("Building the engine")
    time.sleep(0.3)
    screen.beat("rollout: 3 trajectories")
    with screen.bar("step", 4):
        time.sleep(0.3)
    screen.close()
    assert "  ... Building the engine; 0 s so far" in file.getvalue()
    assert "  ... step 0/4 (0%); rollout: 3 trajectories; " in file.getvalue()


def test_the_time_since_the_launch_is_known() -> None:
    screen, _ = console()
    time.sleep(0.05)
    first = screen.elapsed_s
    assert 0.05 <= first <= screen.elapsed_s < 5


def test_other_ranks_are_quiet() -> None:
    screen, file = console(enabled=False, heartbeat_s=0.02, line_every_s=0.0)
    screen.phase("a")
    screen.line("b")
    screen.table([("c", "d")])
    with screen.bar("e", 2) as bar:
        time.sleep(0.1)
        bar.advance(1)
        screen.beat("f")
    screen.close()
    assert file.getvalue() == ""


def test_log_records_go_through_the_console() -> None:
    screen, file = console()
    log = logging.getLogger("test_progress")
    handler = screen.log_handler()
    log.addHandler(handler)
    log.warning("disk [red]full")
    log.removeHandler(handler)
    assert file.getvalue() == "disk [red]full\n"


_ON_A_TERMINAL = """
    import time
    from megatron_spear.tracking.progress import Console
    with Console() as screen:
        screen.phase("Steps")
        with screen.steps(3) as bar:
            for step in range(3):
                bar.finished({"rollout/success": 0.5, "time/step_s": 1.0, "time/train_s": 0.5})
                screen.beat("rollout: 1 trajectories")
                with screen.bar("games", 2) as games:
                    games.at(2)
                    screen.line(f"line {step}")
                    time.sleep(0.12)
        screen.line("the end")
"""


def test_a_terminal_gets_live_bars() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(_ON_A_TERMINAL)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # the child closed the terminal
        pass
    os.close(ours)
    assert child.wait(timeout=20) == 0
    text = seen.decode()
    assert "━" in text
    assert "games" in text
    assert "step 3/3" in text and "train" in text and "50%" in text
    assert "success 0.500 (mean of 3 steps)" in text
    assert all(f"line {step}" in text for step in range(3))
    assert text.rstrip().endswith("the end")


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.4, 59, 200, 7500)] == [
        "0 s",
        "59 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
