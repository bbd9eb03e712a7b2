"""Real chat templates, and a byte-level tokenizer small enough to make in a test."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>"),
)
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>")
_TEXT = """
system user assistant tool ipython
You can call tools. What do 3 pieces of fig cost, in cents? Answer with the number alone.
{"name": "price", "arguments": {"item": "fig"}} {"name": "multiply", "arguments": {"a": 3, "b": 4}}
{"type": "function", "function": {"name": "price", "description": "Price of one piece"}}
"""


def trl_template(name: str) -> str | None:
    """A chat template that the package trl carries (``qwen3``); None where it is not installed.

    Read as a file: importing trl would need all that it depends on.
    """
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def byte_tokenizer(template: str, *, end: str = "<|im_end|>") -> Any:
    """A Hugging Face fast tokenizer of bytes and some merges: any text survives a round trip.

    Special tokens are Qwen's and Llama 3's; the tags of thoughts and calls are one token each and
    not special, as in Qwen3. ``end`` is the eos token.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_trained(),
        eos_token=end,
        bos_token="<|begin_of_text|>",
        additional_special_tokens=[token for token in _SPECIAL if token != end],
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _trained() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 20, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in _TAGS])
    return tokenizer
