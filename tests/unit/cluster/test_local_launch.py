"""A launch on one machine: attempts after crashes, none after a stop, one launch at a time."""

import signal
from pathlib import Path

import pytest
from fake_programs import TIMES, python

from megatron_spear.cluster.attempt import Attempt, attempts
from megatron_spear.cluster.local import one_machine_problems, only_launch, run_attempts
from megatron_spear.cluster.stop import StopSignals
from megatron_spear.cluster.supervisor import Starts
from megatron_spear.config.load import load_config
from megatron_spear.errors import ConfigError

CRASHES_WITH_PROGRESS = """
import sys
from pathlib import Path
attempt = Path(sys.argv[1])
number = int(attempt.name.split("_")[1])
(attempt.parent / "checkpoints" / f"step_{number + 1}").mkdir(parents=True)
sys.exit(9 if number < 2 else 0)
"""
CRASHES = "raise SystemExit(9)"
STOPS = """
import sys, time
from pathlib import Path
Path(sys.argv[1], "stopped.json").write_text('{"reason": "SIGTERM", "step": 1}')
"""
WRONG = """
import sys
from pathlib import Path
Path(sys.argv[1], "hopeless.json").write_text('{"reason": "no such game"}')
sys.exit(1)
"""


def launched(run: Path, program: str, stop: StopSignals | None = None) -> tuple[int, list[str]]:
    run.mkdir(exist_ok=True)
    said: list[str] = []

    def starts(attempt: Attempt) -> Starts:
        return Starts(
            trainer=lambda meeting: python(program, attempt.path),
            engine=lambda index, model, port: python(""),
            environment=lambda index, file: python(""),
        )

    status = run_attempts(
        load_config(None),
        run,
        stop=stop or StopSignals(),
        say=said.append,
        times=TIMES,
        starts=starts,
    )
    return status, said


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_spear.cluster.local._PAUSE_S", 0.01)


def test_crashes_with_progress_are_followed_by_another_attempt(tmp_path: Path) -> None:
    status, said = launched(tmp_path / "run", CRASHES_WITH_PROGRESS)
    assert status == 0
    assert len(attempts(tmp_path / "run")) == 3
    assert sum("crashed with status 9" in line for line in said) == 2


def test_crashes_without_progress_end_the_launch_with_their_status(tmp_path: Path) -> None:
    status, said = launched(tmp_path / "run", CRASHES)
    assert status == 9
    assert len(attempts(tmp_path / "run")) == 3
    assert "in a row without a new checkpoint" in said[-1]


def test_what_no_restart_mends_is_not_tried_again(tmp_path: Path) -> None:
    status, said = launched(tmp_path / "run", WRONG)
    assert (status, len(attempts(tmp_path / "run"))) == (2, 1)
    assert "no such game" in said[-1]


def test_a_stop_of_this_launch_ends_it_and_says_how_to_go_on(tmp_path: Path) -> None:
    stop = StopSignals()
    stop.request(signal.SIGTERM)
    status, said = launched(tmp_path / "run", STOPS, stop)
    assert (status, len(attempts(tmp_path / "run"))) == (130, 1)
    assert said[-1].endswith(f"megatron-spear launch local resume={tmp_path / 'run'}")


def test_a_launch_by_the_user_has_the_whole_budget_again(tmp_path: Path) -> None:
    for launches in (1, 2):
        status, _ = launched(tmp_path / "run", CRASHES)
        assert (status, len(attempts(tmp_path / "run"))) == (9, 3 * launches)


def test_one_launch_of_a_run_at_a_time(tmp_path: Path) -> None:
    with only_launch(tmp_path):
        with pytest.raises(ConfigError, match="another `launch local`"):
            launched(tmp_path, CRASHES)
        assert attempts(tmp_path) == []
    with only_launch(tmp_path):
        pass


def test_several_machines_are_refused() -> None:
    config = load_config(None, ["cluster.engine_nodes=1"])
    assert len(list(one_machine_problems(config))) == 1
    assert list(one_machine_problems(load_config(None))) == []


@pytest.mark.parametrize(
    ("numbers", "reason", "at_once"),
    [
        ([], "", False),
        ([signal.SIGUSR1, signal.SIGINT], "SIGUSR1", False),
        ([signal.SIGINT, signal.SIGINT], "SIGINT", True),
        ([signal.SIGTERM, signal.SIGTERM], "SIGTERM", False),
    ],
)
def test_what_signals_ask_for(numbers: list[int], reason: str, at_once: bool) -> None:
    stop = StopSignals()
    for number in numbers:
        stop.request(number)
    assert (stop.reason, stop.at_once) == (reason, at_once)
