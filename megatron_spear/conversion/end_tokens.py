"""The tokens with which a model ends its answers, as its folder says."""

import json
from pathlib import Path
from typing import Any

from megatron_spear.errors import CheckpointError


def end_token_ids(folder: Path, config: Any) -> frozenset[int]:
    """What ends a generation by itself: ``eos_token_id`` of ``config`` (the folder's transformers
    config) and of generation_config.json, where there is one.

    Engines read both. A chat model names more there than its tokenizer's eos token: Llama 3.1 ends
    a call of a tool with ``<|eom_id|>``. Ids outside the vocabulary are left out, since they are
    never drawn. Raises CheckpointError for what is neither an id nor a list of ids.
    """
    file = folder / "generation_config.json"
    found = _ids(getattr(config, "eos_token_id", None), folder / "config.json")
    if file.is_file():
        found |= _ids(_read(file).get("eos_token_id"), file)
    size = getattr(config, "vocab_size", None)
    return frozenset(token for token in found if token >= 0 and (size is None or token < size))


def _ids(value: Any, file: Path) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(
            f"eos_token_id in {file} is {value!r}; expected a token id, a list of them, or null"
        )
    return set(ids)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; save it again")
    return content
