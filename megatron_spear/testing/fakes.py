"""Small stand-ins for heavy parts: a scripted rollout engine and a word-level tokenizer."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import Generation, GenerationRequest, PauseMode
from megatron_spear.types import TokenArray, VersionSpan

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The ChatML template, as Qwen's without its default system message."""

ROLE_TOKENS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A short template: one token a role, and an end token after answers only."""


class ScriptedEngine:
    """A rollout engine that answers with ``answer(request)`` token ids; keeps the requests it saw.

    An answer ends where a stop token, ``max_new_tokens`` or ``max_context`` ends it; one that goes
    on past its script is a ValueError. An exception in ``answer`` comes out of ``generate``.
    """

    def __init__(
        self, answer: Callable[[GenerationRequest], list[int]], *, max_context: int = 512
    ) -> None:
        self.policy_version = 0
        self.max_context = max_context
        self.requests: list[GenerationRequest] = []
        self.released: set[str] = set()
        self._answer = answer
        self._closed = False
        self._going = asyncio.Event()
        self._going.set()

    async def generate(self, request: GenerationRequest) -> Generation:
        """The scripted answer, after one turn of the event loop."""
        if self._closed:
            raise EngineError("the engine cannot generate: it is closed")
        request.check()
        await asyncio.sleep(0)
        await self._going.wait()
        self.requests.append(request)
        script = np.asarray(self._answer(request), np.int32)
        for size in range(len(script) + 1):
            reason = request.finish_reason(script[:size].tolist(), self.max_context)
            if reason is not None:
                return Generation(
                    token_ids=script[:size],
                    logprobs=np.full(size, -0.5, np.float32),
                    finish_reason=reason,
                    versions=(VersionSpan(self.policy_version, size),),
                )
        raise ValueError(f"the script of session {request.session!r} ends before the answer does")

    def release(self, session: str) -> None:
        """Remember that the session was released."""
        self.released.add(session)

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Take the version only."""
        for _ in named_tensors:
            pass
        self.policy_version = policy_version

    async def pause(self, mode: PauseMode) -> None:
        """Let no request begin until ``resume``."""
        self._going.clear()

    async def resume(self) -> None:
        """Go on."""
        self._going.set()

    async def close(self) -> None:
        """Refuse further requests."""
        self._closed = True


def word_tokenizer(words: Iterable[str], template: str) -> Any:
    """A Hugging Face fast tokenizer with one token a word, newlines included, and a chat template.

    Special tokens: ``<|im_start|>``, ``<|im_end|>`` (also eos and pad), ``<|system|>``,
    ``<|user|>``, ``<|assistant|>``; other words are ``<unk>``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    roles = ["system", "user", "assistant", "\n"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *roles, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), behavior="removed"),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=[t for t in special if t not in ("<unk>", "<|im_end|>")],
    )
    wrapped.chat_template = template
    return wrapped


def answer_text(tokenizer: Any, text: str) -> TokenArray:
    """int32 ``[A]``: the tokens of a complete answer, end token included."""
    return np.asarray(
        [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], np.int32
    )
