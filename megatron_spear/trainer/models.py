"""The initial policy as a Hugging Face folder: the user's, or a tiny one made and kept in the
cache."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_spear.config.presets.layouts import PRESETS
from megatron_spear.config.presets.models import SHAPE_KEYS
from megatron_spear.config.schema import ModelSection
from megatron_spear.conversion.hf_io import check_tokenizer
from megatron_spear.conversion.shape import load_config
from megatron_spear.conversion.tiny_model import make_tiny_model
from megatron_spear.envs.family import EnvironmentFamily, Vocabulary
from megatron_spear.errors import ConfigError

_FORMAT = 3  # raise it when the making of tiny models changes, so that old ones are not used


def initial_model(section: ModelSection, family: EnvironmentFamily) -> Path:
    """The folder of the initial policy; a missing tiny model is made, with a tokenizer over the
    words of the family's tasks. For the controller alone.

    Raises CheckpointError for a broken folder or a tokenizer that does not fit the model.
    """
    if section.path is not None:
        folder = section.path
    else:
        words = family.vocabulary()
        folder = tiny_model_folder(section, words)
        if not folder.is_dir():
            with made_once(folder) as work:
                make_tiny_model(
                    work,
                    section.tiny,
                    words.words,
                    words.phrases,
                    words.names,
                    roles=words.roles,
                    single_digits=words.single_digits,
                )
    check_model(folder)
    return folder


@contextlib.contextmanager
def made_once(folder: Path) -> Iterator[Path]:
    """Where to write ``folder``: it gets its name at the end of the block, and is not there before.

    The one that another run has made meanwhile stays instead; after an error nothing stays.
    """
    work = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield work
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_model(folder: Path) -> None:
    """Raise CheckpointError unless config and tokenizer are there and fit each other."""
    check_tokenizer(folder, load_config(folder).vocab_size)


def check_preset(preset: str | None, folder: Path) -> None:
    """ConfigError if the preset's layout is for a model of another shape than the folder's."""
    if preset is None:
        return
    config, published = load_config(folder), PRESETS[preset].published
    wrong = [
        f"{key} is {getattr(config, key, None)}, expected {published.config[key]}"
        for key in SHAPE_KEYS
        if getattr(config, key, None) != published.config[key]
    ]
    if wrong:
        raise ConfigError(
            f"preset={preset} is a layout of {published.hub_name}, and {folder} is another model: "
            f"{'; '.join(wrong)}; name a preset of this model, or none and policy.* settings"
        )


def tiny_model_folder(section: ModelSection, words: Vocabulary) -> Path:
    """Where the tiny model of this shape and vocabulary lies: a name from a hash of both."""
    made_from = json.dumps(
        [_FORMAT, section.tiny.model_dump(), words.words, words.phrases, words.names]
        + ([words.roles, words.single_digits] if words.roles or words.single_digits else [])
    )
    return section.cache_dir / f"tiny-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"
