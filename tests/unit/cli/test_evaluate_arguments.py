"""From ``evaluate``'s command line to the configuration that is played."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.cli import main
from megatron_spear.config.load import dump_config, load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.deadlines import StopFlag
from megatron_spear.errors import ConfigError
from megatron_spear.trainer.evaluated_model import EvaluatedModel


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunConfig, Any, Any]]:
    """``evaluated("hf", "-n", "4")``: the configuration, model and folder that are played."""
    from megatron_spear.trainer import jobs

    seen: list[Any] = []

    def take(config: RunConfig, model: EvaluatedModel, stop: Any, out: Path | None) -> None:
        seen.append((config, model, out))

    monkeypatch.setattr(jobs, "evaluate_model", take)
    monkeypatch.setattr("megatron_spear.deadlines.install_stop_signals", StopFlag)

    def run(*arguments: str) -> tuple[RunConfig, Any, Any]:
        assert main.run(["evaluate", *map(str, arguments)]) == 0
        return seen[-1]

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with an exported model, as far as this command looks."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    settings = ["run.seed=5", "env.max_turns=33", "evaluation.games=7", "evaluation.top_p=0.9"]
    (folder / "config.yaml").write_text(dump_config(load_config(None, settings)))
    return folder


def test_all_options(evaluated: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    config, found, out = evaluated(
        model, "--env", "alfworld", "--panel", tmp_path, "-n", "32", "--temperature", "0.4",
        "--top-p=0.6", "--out", tmp_path / "out", "env.max_turns=50", "--env.prompt", "official",
    )  # fmt: skip
    assert (found.folder, found.config, out) == (model, None, tmp_path / "out")
    section = config.evaluation
    assert (section.attempts, section.temperature, section.top_p) == (32, 0.4, 0.6)
    assert (config.env.games, config.env.eval_split, section.games) == (tmp_path, None, None)
    assert (config.env.type, config.env.max_turns, config.env.prompt) == (
        "alfworld", 50, "official"
    )  # fmt: skip


def test_a_run_brings_its_settings(evaluated: Callable[..., Any], run_dir: Path) -> None:
    config, found, out = evaluated(run_dir)
    assert (found.folder, out) == (run_dir / "model", None)
    assert (config.run.seed, config.env.max_turns) == (5, 33)
    assert (config.evaluation.games, config.evaluation.top_p) == (7, 0.9)
    config, _, _ = evaluated(run_dir, "env.max_turns=4", "-n2")
    assert (config.env.max_turns, config.evaluation.attempts) == (4, 2)


def test_a_file_comes_over_the_runs_own(
    evaluated: Callable[..., Any], run_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("run: {seed: 9}\n")
    config, found, _ = evaluated("run.steps=3", run_dir, file)
    assert (config.run.seed, config.env.max_turns, config.run.steps) == (9, 20, 3)
    assert found.folder == run_dir / "model"


def test_a_panel_is_all_of_it_unless_a_setting_says_how_many(
    evaluated: Callable[..., Any], run_dir: Path, tmp_path: Path
) -> None:
    config, _, _ = evaluated(run_dir, "--panel", tmp_path, "evaluation.games=3")
    assert (config.env.games, config.evaluation.games) == (tmp_path, 3)
    config, _, _ = evaluated(run_dir, "--panel", "valid_unseen", f"env.games={tmp_path}")
    assert (config.env.eval_split, config.evaluation.games) == ("valid_unseen", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "chess"], r"env.type: got 'chess'.*'alfworld'"),
        (["--env", "alfworld", "-n", "0"], "evaluation.attempts: got 0.*>= 1"),
        (["--env", "alfworld", "--top-p", "0"], "evaluation.top_p: got 0.*> 0"),
        (["--env", "alfworld", "--temperature=-1"], "evaluation.temperature: got -1"),
        (["--env", "alfworld", "--panel", "nowhere"], "--panel nowhere: no such file or folder"),
        (["--env", "alfworld", "--tempreature", "1"], "tempreature: no such key"),
        ([], "nothing says what to play"),
        (["env.max_turns=3"], "nothing says what to play"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, evaluated: Callable[..., Any], model: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluated(model, *arguments)


def test_a_map_of_env_names_it_too(evaluated: Callable[..., Any], model: Path) -> None:
    environment = json.dumps({"type": "alfworld", "max_turns": 3})
    assert evaluated(model, f"env={environment}")[0].env.max_turns == 3
