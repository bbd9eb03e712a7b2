"""A run directory belongs to one run."""

import json
import logging
from pathlib import Path

import pytest

from megatron_spear.config.load import load_config
from megatron_spear.errors import ConfigError
from megatron_spear.trainer.run_directory import RunDirectory


def test_a_new_directory_holds_the_config_and_versions(tmp_path: Path) -> None:
    config = load_config(None, ["run.steps=3"])
    run = RunDirectory.create(tmp_path / "a" / "b", config)
    assert load_config(run.config_file) == config
    assert json.loads(run.versions_file.read_text())["numpy"][0].isdigit()
    assert run.checkpoints.is_dir()
    assert run.metrics_file.parent == run.summary_file.parent == run.curves_file.parent == run.path


def test_an_empty_or_barely_started_directory_is_taken(tmp_path: Path) -> None:
    config = load_config()
    RunDirectory.create(tmp_path, config)
    RunDirectory.create(tmp_path, config).metrics_file.touch()
    RunDirectory.create(tmp_path, config)


def test_a_foreign_directory_or_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(
        ConfigError, match=r"no run directory \(holds thesis.tex\).*another run.dir"
    ):
        RunDirectory.create(tmp_path, load_config())
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory.create(tmp_path / "thesis.tex", load_config())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_config_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, load_config())
    other = load_config(None, ["rollout.group_size=4", "run.name=x", "env.history={window: 2}"])
    with pytest.raises(ConfigError) as told:
        RunDirectory.create(tmp_path, other)
    assert "rollout.group_size: was 8, now 4" in str(told.value)
    assert "env.history.window: was None, now 2" in str(told.value)
    assert "run.name" not in str(told.value)
    assert f"resume={tmp_path}" in str(told.value)


def test_a_run_with_checkpoints_wants_resume(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, load_config())
    (run.checkpoints / "step_20").mkdir()
    with pytest.raises(ConfigError, match=f"continue it with resume={tmp_path}"):
        RunDirectory.create(tmp_path, load_config())


def test_a_run_with_metrics_only_is_not_overwritten(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, load_config())
    run.metrics_file.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="no checkpoint to continue"):
        RunDirectory.create(tmp_path, load_config())


def test_resume_takes_the_config_of_the_directory(tmp_path: Path, caplog) -> None:
    first = load_config(None, ["run.steps=9", "run.stop_after=2", f"run.dir={tmp_path}"])
    RunDirectory.create(tmp_path, first)
    again = load_config(None, [f"resume={tmp_path}", "rollout.env_workers=2"])
    assert (again.run.steps, again.run.stop_after, again.run.dir) == (9, None, tmp_path)
    with caplog.at_level(logging.INFO):
        run = RunDirectory.resume(tmp_path, again)
    assert "rollout.env_workers: was 1, now 2" in caplog.text
    assert load_config(run.config_file).rollout.env_workers == 2
    assert load_config(run.config_file).resume is None


def test_resume_refuses_other_settings_and_other_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.yaml"):
        RunDirectory.resume(tmp_path, load_config())
    RunDirectory.create(tmp_path, load_config())
    with pytest.raises(ConfigError, match=r"(?s)reward.success: was 1.0, now 2.0.*what to do"):
        RunDirectory.resume(tmp_path, load_config(None, ["reward.success=2", f"resume={tmp_path}"]))


def test_resume_warns_of_changed_packages(tmp_path: Path, caplog) -> None:
    run = RunDirectory.create(tmp_path, load_config())
    versions = json.loads(run.versions_file.read_text())
    run.versions_file.write_text(json.dumps({**versions, "numpy": "1.0"}))
    RunDirectory.resume(tmp_path, load_config(None, [f"resume={tmp_path}"]))
    assert "numpy was 1.0, is now" in caplog.text


def test_two_processes_cannot_run_one_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", load_config())
    with run.alone():
        with (
            pytest.raises(ConfigError, match="another process is running this run"),
            RunDirectory(run.path).alone(),
        ):
            pass
        assert run.config_file.is_file()
    with RunDirectory(run.path).alone():
        pass
    with RunDirectory(tmp_path / "absent").alone():
        pass


def test_models_of_finished_runs_are_kept_and_those_of_killed_ones_are_not(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for text in ("first", "second"):
        model = run.place_for_model()
        model.mkdir()
        (model / "weights").write_text(text)
        run.summary_file.write_text("{}")
    unfinished = tmp_path / ".model.writing-7"
    unfinished.mkdir()
    assert run.place_for_model() == tmp_path / "model" and not (tmp_path / "model").exists()
    kept = [(tmp_path / f"model.before-{n}" / "weights").read_text() for n in (1, 2)]
    assert kept == ["first", "second"] and not unfinished.exists()
    run.summary_file.unlink()
    (tmp_path / "model").mkdir()
    run.place_for_model()
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.before-3").exists()


def test_what_a_kill_left_of_the_making_is_taken_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml.tmp").write_text("run: {na")
    RunDirectory.create(tmp_path, load_config())
    assert RunDirectory(tmp_path).config_file.is_file()
