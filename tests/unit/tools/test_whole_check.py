"""``tools/test.sh`` with stubs for the programs it runs: what runs, in which order, how it ends."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Writes down its own name and arguments; fails for what STUB_FAILS is a part of.
STUB = """#!/usr/bin/env bash
case "$*" in
    *"megatron.core as m"*) echo 0.19.2; exit ;;
esac
echo "${0##*/} $*" >> "$STUB_CALLS"
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || echo "nothing compiled is kept" >> "$STUB_CALLS"
echo "output of $*"
[ -z "${STUB_FAILS:-}" ] || [[ "${0##*/} $*" != *"$STUB_FAILS"* ]]
"""
PROGRAMS = ("python", "ruff", "mypy", "lint-imports", "apt-get", "bwrap", "chromium")
MAIN, SLURM, SECOND = "-m pytest -n 2 ", " -m slurm tests/slurm", " -k not untied "

Run = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run("tests/unit", STUB_FAILS="mypy")``: the script's end, and the calls in their order."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        (venv / "bin" / name).write_text(STUB)
        (venv / "bin" / name).chmod(0o755)
    stamp = "source tools/cpu_venv.sh; stamp_of setup.py tools/constraints-cpu.txt"
    made = subprocess.check_output(["bash", "-c", f"venv={venv}; {stamp}"], cwd=ROOT, text=True)
    Path(made.strip()).touch()
    (venv / "megatron-0.19.2").mkdir()
    (venv / "megatron-0.19.2" / ".complete").touch()

    def start(*arguments: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        (tmp_path / "calls").write_text("")
        own = {
            "SPEAR_VENV": str(venv),
            "STUB_CALLS": str(tmp_path / "calls"),
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [str(ROOT / "tools" / "test.sh"), *arguments],
            env={**os.environ, **own, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done, (tmp_path / "calls").read_text().splitlines()

    return start


def test_everything_is_run_once(run: Run) -> None:
    done, calls = run()
    assert done.returncode == 0, done.stdout + done.stderr
    code = ["ruff check .", "ruff format --check .", "mypy ", "lint-imports "]
    assert [call for call in calls if not call.startswith(("python", "apt-get"))] == code
    tests = [call for call in calls if "-m pytest" in call]
    assert len(tests) == 3 and all(calls.index(call) > calls.index(code[-1]) for call in tests)
    for part in (MAIN, SLURM, SECOND):
        assert sum(part in call for call in tests) == 1, part
    assert all(f"output of {call.removeprefix('python ')}" in done.stdout for call in tests)
    assert "nothing compiled is kept" not in calls


@pytest.mark.parametrize("part", [MAIN, SLURM, SECOND])
def test_whatever_fails_the_rest_is_run_and_the_whole_fails(part: str, run: Run) -> None:
    done, calls = run(STUB_FAILS=part)
    assert done.returncode == 1
    tests = [call for call in calls if "-m pytest" in call]
    assert len(tests) == 3
    assert all(f"output of {call.removeprefix('python ')}" in done.stdout for call in tests)


def test_code_that_is_refused_is_not_tested(run: Run) -> None:
    done, calls = run(STUB_FAILS="mypy")
    assert done.returncode == 1
    assert not [call for call in calls if "-m pytest" in call]


def test_arguments_go_to_pytest(run: Run) -> None:
    done, calls = run("tests/unit/replay", "-x")
    assert done.returncode == 0, done.stderr
    assert calls[-2:] == ["lint-imports ", "python -m pytest tests/unit/replay -x"]
    failed, _ = run("tests/unit/replay", STUB_FAILS="tests/unit/replay")
    assert failed.returncode == 1
