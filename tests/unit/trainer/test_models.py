"""The initial model's folder: named by shape and vocabulary, made once, never half-made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.config.presets.models import MODELS
from megatron_spear.config.schema import ModelSection, TinyModelSection
from megatron_spear.envs.alfworld.family import AlfworldFamily
from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.trainer import models
from megatron_spear.trainer.models import (
    check_model,
    check_preset,
    initial_model,
    made_once,
    tiny_model_folder,
)

SHAPE = TinyModelSection(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_size=16)
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


FAMILY = AlfworldFamily(AlfworldSection())
WORDS = FAMILY.vocabulary()


def _section(cache: Path, **shape: int) -> ModelSection:
    return ModelSection(tiny=SHAPE.model_copy(update=shape), cache_dir=cache)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initial_model(_section(tmp_path_factory.mktemp("cache")), FAMILY)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, made: Path) -> list[Path]:
    """Making a model is copying a ready one; gives the list of folders it was made in."""
    folders: list[Path] = []

    def copy(folder: Path, *_: Any, **__: Any) -> Path:
        folders.append(folder)
        shutil.copytree(made, folder)
        return folder

    monkeypatch.setattr(models, "make_tiny_model", copy)
    return folders


def test_the_folder_is_complete_and_named_by_what_it_is_made_from(made: Path) -> None:
    assert {file.name for file in made.iterdir()} >= FILES
    assert made == tiny_model_folder(_section(made.parent), WORDS)
    assert [entry.name for entry in made.parent.iterdir()] == [made.name]
    check_model(made)


def test_the_name_depends_on_every_number_of_the_shape(tmp_path: Path) -> None:
    changes = [{name: 64} for name in TinyModelSection.model_fields]
    names = {
        tiny_model_folder(_section(tmp_path, **change), WORDS).name for change in [{}, *changes]
    }
    assert len(names) == 1 + len(changes)


@pytest.mark.parametrize("part", ["words", "phrases", "names"])
def test_the_name_depends_on_the_vocabulary(tmp_path: Path, part: str) -> None:
    other = replace(WORDS, **{part: getattr(WORDS, part)[1:]})
    section = _section(tmp_path)
    assert tiny_model_folder(section, other) != tiny_model_folder(section, WORDS)


def test_a_model_is_made_once(tmp_path: Path, make: list[Path]) -> None:
    section = _section(tmp_path / "new" / "cache")
    folder = initial_model(section, FAMILY)
    assert initial_model(section, FAMILY) == folder and len(make) == 1
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_half_written_folder_is_not_used(
    tmp_path: Path, make: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    section, copy = _section(tmp_path), models.make_tiny_model

    def write_half(folder: Path, *_: Any, **__: Any) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "make_tiny_model", write_half)
    with pytest.raises(KeyboardInterrupt):
        initial_model(section, FAMILY)
    assert not tiny_model_folder(section, WORDS).exists()
    monkeypatch.setattr(models, "make_tiny_model", copy)
    folder = initial_model(section, FAMILY)
    assert {file.name for file in folder.iterdir()} >= FILES
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


def test_two_runs_may_make_it_at_the_same_time(
    tmp_path: Path, made: Path, make: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    section, copy = _section(tmp_path), models.make_tiny_model
    first = tiny_model_folder(section, WORDS)

    def late(folder: Path, *rest: Any, **named: Any) -> Path:
        shutil.copytree(made, first)
        (first / "first").touch()
        return copy(folder, *rest, **named)

    monkeypatch.setattr(models, "make_tiny_model", late)
    assert initial_model(section, FAMILY) == first
    assert (first / "first").exists(), "the other run's folder stays"
    assert [entry.name for entry in tmp_path.iterdir()] == [first.name]


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_broken_folder_is_refused_and_left_alone(
    tmp_path: Path, made: Path, missing: str
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(made, folder)
    assert initial_model(ModelSection(path=folder), FAMILY) == folder
    (folder / missing).unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match="mine"):
        initial_model(ModelSection(path=folder), FAMILY)
    assert sorted(folder.iterdir()) == before


def test_what_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "made"
    with pytest.raises(KeyboardInterrupt), made_once(folder) as work:
        work.mkdir()
        raise KeyboardInterrupt
    assert not any(folder.parent.iterdir())
    for name in ("first", "second"):
        with made_once(folder) as work:
            work.mkdir()
            (work / name).touch()
    assert [file.name for file in folder.iterdir()] == ["first"]
    assert [entry.name for entry in folder.parent.iterdir()] == ["made"]
    folder.parent.joinpath("file").touch()
    with pytest.raises(NotADirectoryError), made_once(folder.parent / "file") as work:
        work.mkdir()


def test_a_preset_is_for_models_of_its_shape(tmp_path: Path) -> None:
    config = dict(MODELS["qwen2.5-7b"].config) | {"vocab_size": 152100, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_preset("qwen2.5-7b-8gpus", tmp_path)  # a fine-tuned one with more words
    check_preset(None, tmp_path)
    with pytest.raises(ConfigError) as told:
        check_preset("qwen2.5-32b-32gpus", tmp_path)
    assert "is a layout of Qwen/Qwen2.5-32B, and " in str(told.value)
    assert "hidden_size is 3584, expected 5120; num_hidden_layers is 28" in str(told.value)
    assert "model_type" not in str(told.value)
