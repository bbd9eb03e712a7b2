"""Shapes from config.json without transformers, against those with it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_spear.config.presets.models import MODELS
from megatron_spear.conversion.plain_config import shape_of_folder, shape_of_values
from megatron_spear.conversion.shape import SUPPORTED, load_config, model_shape
from megatron_spear.errors import CheckpointError, ConfigError

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("name", MODELS)
def test_published_models(name: str) -> None:
    config = MODELS[name].config
    assert shape_of_values(config, name) == model_shape(AutoConfig.for_model(**config))


@pytest.mark.parametrize("family", SUPPORTED)
def test_what_a_file_leaves_out_is_what_transformers_gives(family: str) -> None:
    values = {"model_type": family, **SIZES}
    if family == "mistral":
        values["sliding_window"] = None  # else both refuse it
    assert shape_of_values(values, "it") == model_shape(
        AutoConfig.for_model(family, **values_of(values))
    )


def values_of(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "model_type"}


def test_a_folder_that_transformers_wrote(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen2", **values_of(SIZES)).save_pretrained(tmp_path)
    assert shape_of_folder(tmp_path) == model_shape(load_config(tmp_path))


def test_mistrals_window_is_refused_where_the_file_is_silent() -> None:
    with pytest.raises(ConfigError, match="sliding_window 4096"):
        shape_of_values({"model_type": "mistral", **SIZES}, "it")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "no table"),
        ("{}", "model_type|hidden_size"),
        (json.dumps({"model_type": "llama", **SIZES, "vocab_size": "many"}), "vocab_size missing"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        shape_of_folder(tmp_path)


def test_another_architecture() -> None:
    with pytest.raises(ConfigError, match="model_type 'gpt2' has no weight table"):
        shape_of_values({"model_type": "gpt2", **SIZES}, "it")
