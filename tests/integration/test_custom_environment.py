"""The example of an environment of one's own, in a real run and in check-config."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.timeout(300)

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom"
TINY = (
    "model.tiny={hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2, ffn_size: 32}",
    "sft.steps=15",
    "sft.optimizer.warmup_steps=2",
    "sft.trajectories_per_step=8",
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "rollout.max_slots=8",
    "evaluation.games=4",
    "tracking.wandb=false",
    "tracking.curves=false",
    "run.threads=1",
)


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example's settings, from a folder that has its two files."""
    folder = tmp_path / "examples" / "custom"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return folder / "quickstart.yaml"


def test_the_example_for_two_steps_over_a_stop(
    settings_file: Path, tmp_path: Path, command: Callable[..., Any], training_records: Any
) -> None:
    run_dir = tmp_path / "run"
    settings = (*TINY, f"model.cache_dir={tmp_path / 'cache'}", f"run.dir={run_dir}")
    line = ("train", str(settings_file), *settings, "run.steps=2")
    command(*line, "run.stop_after=1")
    command("train", f"resume={run_dir}")
    records = training_records(run_dir)
    assert list(records) == [1, 2]
    for record in records.values():
        assert record["rollout/num_trajectories"] == 8.0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["failed_before"] == summary["failed_after"] == 0
    kept = yaml.safe_load((run_dir / "config.yaml").read_text())["env"]
    assert kept["family"] == "examples/custom/number_game.py:NumberGame"
    assert kept["settings"] == {"highest": 20, "width": 16, "guesses": 5}


@pytest.mark.parametrize("name", ["train", "check-config"])
def test_mistakes_in_it_end_the_command_at_the_start(
    name: str, settings_file: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    run_dir = tmp_path / "run"
    wrong = ("env.settings={width: 30, lowest: 1}", f"run.dir={run_dir}")
    hook = "hooks=[{name: a, path: 'absent.py:Hook'}]"
    done = command(name, str(settings_file), *TINY, *wrong, hook, status=2)
    assert "this environment cannot be used (docs/environments.md)" in done.err
    assert "env.settings.lowest: no such key" in done.err
    assert "hooks[0].path: absent.py:Hook: there is no file" in done.err
    done = command(name, str(settings_file), *TINY, "env.settings.width=30", wrong[1], status=2)
    assert "env.settings: width=30 is above highest=20; lower it" in done.err
    assert "Traceback" not in done.err and not run_dir.exists()
