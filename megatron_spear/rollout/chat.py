"""Chat messages as tokens, token in - token out: what was sampled is never tokenised again.

A chat template is text around contents. The text between an answer and the next is found once for
each sequence of roles, by rendering placeholders; from then on a turn is extended with the tokens
of that glue and of the new messages only. So it holds for templates that rewrite history as well
(Qwen3 drops earlier ``<think>`` blocks): the context keeps what the policy really wrote.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_spear.errors import ConfigError
from megatron_spear.rollout.templates import ChatTemplate, Glue
from megatron_spear.types import Message, TokenArray

_THINK = "<think>"
# Tokens at a prompt's end that surely hold the tag and the line breaks behind it.
_TAIL_TOKENS = 16


class ChatRenderer:
    """Renders chats with a Hugging Face tokenizer and its chat template.

    Example (ChatML, sampled answer ``look<|im_end|>``): extending by a user's message ``A desk.``
    gives the tokens of ``\\n<|im_start|>user\\nA desk.<|im_end|>\\n<|im_start|>assistant\\n``;
    where the answer was cut by length, ``<|im_end|>`` comes first.

    ``end_tokens`` are the model's own; answers stop there too, as they do on a server.
    Raises ConfigError when the tokenizer has no usable chat template.
    """

    def __init__(self, tokenizer: Any, end_tokens: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._glues: dict[tuple[str, ...], tuple[Glue, int | None]] = {}
        self._fast: Any = None
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {
            *tokenizer.all_special_ids,
            *(i for i, token in added.items() if token.special),
        }
        glue, end = self._glue(("user",))
        self._fast = self._fast_encoder(glue.join(["content 1"]))
        # What closes a demonstrated answer: the template's token where it has one.
        self.end_token_id = tokenizer.eos_token_id if end is None else end
        stops = {tokenizer.eos_token_id, end, *end_tokens} - {None}
        if not stops:
            raise ConfigError(
                "the tokenizer has neither an eos token nor a special token after assistant "
                "messages; expected one, or answers would never stop: set eos_token"
            )
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(stops))

    def initial(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> TokenArray:
        """int32 ``[P]``: the chat with the opening of the assistant's answer.

        ``tools`` are OpenAI function schemas; the template lists them, or else the system message.
        """
        return np.asarray(self._encode(self._template.render(messages, tools)), np.int32)

    def extend(
        self, action_tokens: Sequence[int] | TokenArray, messages: Sequence[Message]
    ) -> TokenArray:
        """int32 ``[O]``: what comes between ``action_tokens`` and the next answer.

        ``messages`` are new: a user's, or replies of tools. The end-of-turn token is added where
        the action does not end with it (cut by length, or ended by another stop token).
        """
        messages = self._template.adapted(messages)
        glue, end = self._glue(tuple(message["role"] for message in messages))
        tokens = self._encode(glue.join([message["content"] for message in messages]))
        ended = len(action_tokens) > 0 and int(action_tokens[-1]) == end
        if end is not None and not ended:
            tokens = [end, *tokens]
        return np.asarray(tokens, np.int32)

    def decode_action(self, action_tokens: Sequence[int] | TokenArray) -> str:
        """The text of sampled tokens without special tokens."""
        ids = [int(token) for token in action_tokens]
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def opening(self, prompt: Sequence[int] | TokenArray) -> str:
        """How the next answer begins in its prompt: ``<think>\\n`` where the template opens the
        thought itself (QwQ, R1-Distill, Qwen3's thinking models), else "".

        The policy samples only what follows, so what reads an answer reads ``opening`` + its text.
        A prompt says it, not a template: R1-Distill opens no thought after the reply of a tool.
        """
        _, tag, behind = self.text_of(prompt[-_TAIL_TOKENS:]).rpartition(_THINK)
        return "" if behind.strip() else tag + behind

    def text_of(self, tokens: Sequence[int] | TokenArray) -> str:
        """The text of tokens, special ones too: what the engine was given or sampled."""
        ids = [int(token) for token in tokens]
        text: str
        if self._fast is not None:
            text = self._fast.decode(ids, skip_special_tokens=False)
        else:
            text = self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return text

    def encode_action(self, text: str, opening: str = "") -> TokenArray:
        """int32 ``[A]``: a demonstrated answer behind its prompt's ``opening``, with the token that
        ends it before a user's message.

        A thought that the prompt opened is gone on with, or closed where ``text`` has none.
        For supervised data only; sampled answers stay the tokens they are.
        """
        if opening and "</think>" in text:
            text = text.removeprefix(_THINK).lstrip()
        elif opening:
            text = f"\n</think>\n\n{text}"
        return np.asarray([*self._encode(text), self.end_token_id], np.int32)

    def _glue(self, roles: tuple[str, ...]) -> tuple[Glue, int | None]:
        """The text around messages of these roles, behind the token that ends an answer before
        them, and that token; None where the template has none.

        The next role decides: GLM ends an answer by ``<|user|>`` or ``<|observation|>``.
        """
        if roles not in self._glues:
            (first, *rest), forms = self._template.glue(roles)
            end: int | None = None
            tokens = self._encode(first)
            if tokens and tokens[0] in self._special:
                text = self._tokenizer.convert_ids_to_tokens(tokens[0])
                if first.lstrip().startswith(text):
                    end, first = tokens[0], first.partition(text)[2]
            self._glues[roles] = Glue((first, *rest), forms), end
        return self._glues[roles]

    def _encode(self, text: str) -> list[int]:
        ids: list[int]
        if self._fast is not None:
            ids = self._fast.encode(text, add_special_tokens=False).ids
        else:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _fast_encoder(self, sample: str) -> Any:
        """The tokenizer's compiled part, where it gives the same tokens and text; else None.

        transformers spends several times as long around it as it takes itself.
        """
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        if fast is None or fast.truncation is not None or fast.padding is not None:
            return None
        ids = self._encode(sample)
        same = fast.encode(sample, add_special_tokens=False).ids == ids
        same = same and fast.decode(ids, skip_special_tokens=False) == self.text_of(ids)
        return fast if same else None
