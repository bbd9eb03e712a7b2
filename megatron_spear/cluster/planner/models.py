"""Which model is planned for, by its shape alone: no weights, no tokenizer, no torch."""

from difflib import get_close_matches
from pathlib import Path

from megatron_spear.config.presets.layouts import PRESETS
from megatron_spear.config.presets.models import MODELS
from megatron_spear.config.schema import RunConfig, TinyModelSection
from megatron_spear.conversion.plain_config import shape_of_folder, shape_of_values
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.word_tokenizer import vocabulary
from megatron_spear.envs.family import Vocabulary, family_of
from megatron_spear.errors import ConfigError


def planned_model(config: RunConfig, named: str | None = None) -> tuple[str, ModelShape]:
    """What to call the model, and its shape.

    It is the one that is ``named`` (a published model, or a folder with a config.json), else that
    of ``model.path``, else the preset's, else the tiny one that a run would make. The preset's too
    where ``model.path`` is not on this machine: a run refuses a model of another shape.

    Raises ConfigError for an unknown name or a shape that is not supported, CheckpointError for a
    folder without a config.json that can be read.
    """
    if named is not None and named in MODELS:
        return named, shape_of_values(MODELS[named].config, f"the published {named}")
    if named is not None and not Path(named).is_dir():
        raise ConfigError(_unknown(named))
    folder = Path(named) if named is not None else config.model.path
    elsewhere = folder is not None and not folder.expanduser().exists()
    if folder is not None and not (named is None and config.preset is not None and elsewhere):
        return folder.resolve().name, shape_of_folder(folder.expanduser())
    if config.preset is not None:
        return planned_model(config, PRESETS[config.preset].model)
    return "tiny model", _tiny_shape(config.model.tiny, family_of(config.env).vocabulary())


def _unknown(named: str) -> str:
    near = get_close_matches(named.lower(), MODELS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"published models: {', '.join(MODELS)}"
    return f"--model {named} is no published model that is known, and no folder; {hint}"


def _tiny_shape(tiny: TinyModelSection, words: Vocabulary) -> ModelShape:
    """As ``conversion.tiny_model`` makes it."""
    values = {
        "model_type": "qwen3",
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.ffn_size,
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "head_dim": tiny.hidden_size // tiny.num_heads,
        "vocab_size": len(vocabulary(words.words, words.phrases, words.names)),
        "tie_word_embeddings": True,
    }
    return shape_of_values(values, "model.tiny")
