"""The step-overhead benchmark: its arguments, and its table over hand-made metrics."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_spear.trainer.timing import PRODUCTIVE

TOOL = Path(__file__).parents[3] / "tools" / "benchmarks" / "step_overhead.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_overhead", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["step_overhead.py", *arguments])
    tool.main()


def test_help_and_bad_arguments(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        _main(tool, monkeypatch, "--help")
    assert "--steps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        _main(tool, monkeypatch, "--steps", "1")
    assert "got 1, expected at least 2" in capsys.readouterr().err


def test_the_productive_phases_are_the_trainers(tool: ModuleType) -> None:
    assert tool.PRODUCTIVE == PRODUCTIVE


def test_the_table_by_hand(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        settings = dict(part.split("=", 1) for part in command if "=" in part)
        folder = Path(settings["run.dir"])
        folder.mkdir()
        step = {"time/step_s": 4.0, "time/rollout_s": 2.0, "time/train_s": 1.5, "time/eval_s": 9.0}
        rows = [{"time/step_s": 100.0, "time/rollout_s": 1.0}, {"eval/success": 1.0}, step, step]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(tool.subprocess, "run", run)
    _main(tool, monkeypatch, "--steps", "3", "run.seed=5")
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "megatron_spear.cli.main", "train"]
    assert command[-1] == "run.seed=5" and "run.steps=3" in command
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["phase", "median", "s", "share"]
    assert lines[1:4] == [
        ["rollout", "2.000", "50.0%"],
        ["train", "1.500", "37.5%"],
        ["step", "4.000", "100.0%"],
    ]
    assert lines[4][:4] == ["outside", "rollout,", "training", "12.5%"]
    assert lines[5][-3:] == ["over", "2", "steps"]
