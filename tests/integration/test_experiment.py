"""An experiment from its file to its page, the runs within this process."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_runs import TINY, run_here

EXPERIMENT = """
title: Two tiny arms
config: examples/alfworld/quickstart.yaml
settings: [run.steps=2, evaluation.every=1, checkpoint.every=1]
seeds: 1
arms:
  plain: {title: plain, settings: [replay.enabled=false]}
  spear: {title: SPEAR}
compare: [{arm: spear, reference: plain}]
"""


class InTurn:
    """Stands for a pool of threads: the command's signals want the main one."""

    def __init__(self, jobs: int) -> None:
        assert jobs == 1

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *fault: object) -> None: ...

    map = staticmethod(map)


@pytest.fixture
def compare(experiment_modules: dict[str, ModuleType]) -> ModuleType:
    return experiment_modules["compare"]


@pytest.fixture
def call(
    experiment_modules: dict[str, ModuleType],
    compare: ModuleType,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, list[Sequence[str]]]]:
    """Run the script's work; gives its status and the settings of each command it gave."""
    running = experiment_modules["running"]
    file = tmp_path / "tiny.yaml"
    file.write_text(EXPERIMENT)

    def run(*flags: str, fail: str = "") -> tuple[int, list[Sequence[str]]]:
        commands: list[Sequence[str]] = []

        def here(command: str, seed: Any, own: Sequence[str], log: Path) -> str | None:
            commands.append((command, *own))
            if fail and fail in seed.name:
                own = (*own, "run.stop_after=1")  # a run that is cut off
            quiet = "tracking.wandb=false"
            done = run_here([command, str(seed.config), *seed.settings, quiet, *own])
            assert done.status == 0, done.err
            return f"{seed.name}: cut off" if fail and fail in seed.name else None

        monkeypatch.setattr(running, "_spear", here)
        monkeypatch.setattr(running, "ThreadPoolExecutor", InTurn)
        out, work = f"--out={tmp_path / 'out'}", f"--work={tmp_path / 'work'}"
        settings = [*TINY, f"model.cache_dir={cache}"]
        monkeypatch.setattr(
            sys, "argv", ["compare.py", str(file), out, work, "--jobs=1", *flags, *settings]
        )
        with pytest.raises(SystemExit) as ended:
            compare.main()
        return ended.value.code, commands  # type: ignore[return-value]

    return run


def test_a_seed_that_was_cut_off_goes_on_and_what_is_there_is_kept(
    call: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, commands = call(fail="spear")
    assert status == 1 and "failed: spear seed 0: cut off" in capsys.readouterr().err
    assert [command[0] for command in commands] == ["sft", "train", "train"]

    status, commands = call()
    assert status == 0
    assert [command[0] for command in commands] == ["sft", "train"], "the other one is there"
    assert any(setting.startswith("resume=") for setting in commands[1])
    plain, spear = (
        json.loads((tmp_path / "out" / arm / "seed-0.json").read_text())
        for arm in ("plain", "spear")
    )
    assert [e["step"] for e in spear["evaluations"]] == [0, 1, 2]
    assert plain["evaluations"][0] == spear["evaluations"][0], "one warm start"
    assert spear["settings"]["sft.steps"] == 100 and "model.cache_dir" not in spear["settings"]
    assert (
        plain["steps"]["replay/rows"] == [None, None] and None not in spear["steps"]["replay/p50"]
    )
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| SPEAR minus plain |" in page
    assert not (tmp_path / "work" / "tiny" / "spear" / "seed-0").exists(), "only the result is kept"

    assert call() == (0, []), "nothing is left to do"


def test_ctrl_c_says_how_to_go_on(
    compare: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(EXPERIMENT)

    def interrupted(*_: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_all", interrupted)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(file), f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
