"""``megatron-spear report``: arguments, where the file goes, and watching."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_spear.cli import main, report
from megatron_spear.errors import ConfigError
from megatron_spear.testing.recorded_runs import made_run

Told = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run(tmp_path / "run", steps=2, groups=2, members=2, ended=False)


def test_a_run_has_its_report_in_its_folder(run: Path, capsys: Told) -> None:
    assert main.run(["report", str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    told = capsys.readouterr().out
    assert told == f"{run / 'report.html'}: 0.1 MB, 8 trajectories\n"


def test_several_runs_have_it_here(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = made_run(tmp_path / "other", seed=1, steps=2, recorded=False)
    assert report.run([str(run), str(other)]) == 0
    assert report.run(["--group", f"both={run},{other}", "--out", "named.html"]) == 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "named.html").is_file()


def test_the_folder_of_the_file_is_made(run: Path, tmp_path: Path) -> None:
    assert report.run([str(run), "--out", str(tmp_path / "a" / "b" / "x.html")]) == 0
    assert (tmp_path / "a" / "b" / "x.html").is_file()
    with pytest.raises(ConfigError, match=r"config\.yaml is a file, expected a folder"):
        report.run([str(tmp_path), "--out", str(run / "config.yaml" / "x.html")])


def test_what_is_left_out_is_told(run: Path, capsys: Told) -> None:
    (run / "trajectories" / "step-00000002.jsonl.gz").write_bytes(b"")
    assert report.run([str(run)]) == 0
    told = capsys.readouterr().out
    assert "  Recorded trajectories that could not be read: run, step 2.\n" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no run directory given"),
        (["--group", "nothing"], "expected NAME=DIR"),
        (["--group", "a=x", "--group", "a=y"], "a name given twice"),
        (["nowhere"], r"nowhere: holds neither config\.yaml nor metrics\.jsonl"),
        ([".", "--out", "."], "is a folder; expected a file"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        report.run(arguments)


@pytest.mark.parametrize("option", ["--watch=0", "--watch=often", "--max-mb=0.5", "--max-mb=nan"])
def test_numbers_are_checked(option: str, run: Path, capsys: Told) -> None:
    with pytest.raises(SystemExit):
        report.run([str(run), option])
    assert "or more" in capsys.readouterr().err


def slept(action: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Calls ``action`` with a count in place of each sleep; gives the lengths of the sleeps."""
    lengths: list[float] = []

    def sleep(seconds: float) -> None:
        lengths.append(seconds)
        action(len(lengths))

    monkeypatch.setattr(time, "sleep", sleep)
    return lengths


def test_watching_writes_it_anew_until_the_run_has_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    seen = []

    def action(count: int) -> None:
        seen.append((run / "report.html").stat().st_ino)
        if count == 3:
            (run / "summary.json").write_text(json.dumps({"steps": 2}))

    lengths = slept(action, monkeypatch)
    assert report.run([str(run), "--watch", "7"]) == 0
    assert lengths == [7.0] * 3 and len(set(seen)) > 1, "each is another file, whole"
    assert capsys.readouterr().out.count("report.html") == 4
    assert not list(run.glob("*.tmp"))


def test_ctrl_c_ends_watching_and_leaves_a_report(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def action(count: int) -> None:
        raise KeyboardInterrupt

    slept(action, monkeypatch)
    assert report.run([str(run), "--watch"]) == 0
    assert (run / "report.html").is_file()
