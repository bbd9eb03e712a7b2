"""What ``evaluate CHECKPOINT`` takes, what it says of the rest, and where results go."""

from pathlib import Path

import pytest

from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.trainer.evaluated_model import EvaluatedModel, find_model


def make(folder: Path, *files: str) -> Path:
    """A folder with empty files."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "qwen", "config.json")
    expected = EvaluatedModel(folder=folder, config=None, results=tmp_path / "qwen-evaluation")
    assert find_model(folder) == expected


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(tmp_path / "qwen", "config.json"))
    assert find_model(Path()).results == tmp_path / "qwen-evaluation"


def test_a_run_is_its_exported_model_with_its_settings(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "config.yaml", "model/config.json")
    found = find_model(run)
    assert (found.folder, found.config) == (run / "model", run / "config.yaml")
    assert found.results == run / "evaluation"


def test_a_run_without_an_export_says_what_to_do(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "config.yaml")
    with pytest.raises(CheckpointError, match=r"no exported model .* no checkpoint either"):
        find_model(run)
    make(run, "checkpoints/step_2/policy/x", "checkpoints/step_10/policy/x")
    with pytest.raises(CheckpointError) as told:
        find_model(run)
    assert f"train resume={run}`" in str(told.value)
    policy = run / "checkpoints" / "step_10" / "policy"
    assert f"convert megatron-to-hf {policy} DST --config" in str(told.value)
    assert f"evaluate DST {run / 'config.yaml'}`" in str(told.value)


@pytest.mark.parametrize("inside", ["", "policy"])
def test_a_megatron_checkpoint_names_convert(inside: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "step_3", str(Path(inside) / ".metadata"), "config.json")
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint") as told:
        find_model(folder)
    assert f"convert megatron-to-hf {folder / inside} DST" in str(told.value)
    assert ("--config HF_FOLDER" in str(told.value)) is bool(inside)


def test_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", make(tmp_path, "a.txt") / "a.txt"):
        with pytest.raises(CheckpointError, match="no such folder; expected a Hugging Face"):
            find_model(path)


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    model = EvaluatedModel(folder=tmp_path, config=None, results=tmp_path / "evaluation")
    used = []
    for _ in range(3):
        with model.results_folder(None) as folder:
            (folder / "evaluation.json").touch()
        used.append(folder.name)
    assert used == ["evaluation", "evaluation-2", "evaluation-3"]
    with pytest.raises(ConfigError, match="is there already"), model.results_folder(folder):
        pass
    file = make(tmp_path, "a.txt") / "a.txt"
    with pytest.raises(ConfigError, match="is there already"), model.results_folder(file):
        pass


def test_an_evaluation_that_gave_nothing_leaves_nothing(tmp_path: Path) -> None:
    model = EvaluatedModel(folder=tmp_path, config=None, results=tmp_path / "evaluation")
    for out in (None, tmp_path / "deep" / "out"):
        with pytest.raises(ZeroDivisionError), model.results_folder(out) as folder:
            raise ZeroDivisionError
        assert not folder.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    with model.results_folder(empty) as folder:
        (folder / "evaluation.json").touch()
    assert folder == empty and (empty / "evaluation.json").is_file()
