"""Chat messages as tokens, token in - token out: what was sampled is never tokenised again.

A chat template is text around contents. The text between two user messages is found once, by
rendering placeholders; from then on a turn is extended with the tokens of that glue and of the
new message only. So it holds for templates that rewrite history as well (Qwen3 drops earlier
``<think>`` blocks): the context keeps what the policy really wrote.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_spear.envs.views import AgentView, HistoryStep
from megatron_spear.errors import ConfigError
from megatron_spear.types import Message, TokenArray

_USER_1, _ASSISTANT, _USER_2 = "UserPlaceholderOne", "AssistantPlaceholder", "UserPlaceholderTwo"


class ChatRenderer:
    """Renders chats with a Hugging Face tokenizer and its chat template.

    Example (ChatML, sampled answer ``look<|im_end|>``): extending by a user's message ``A desk.``
    gives the tokens of ``\\n<|im_start|>user\\nA desk.<|im_end|>\\n<|im_start|>assistant\\n``;
    where the answer was cut by length, ``<|im_end|>`` comes first.

    Raises ConfigError when the tokenizer has no usable chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast: Any = None
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template; expected one in tokenizer_config.json or "
                "chat_template.jinja beside the tokenizer: use an instruction-tuned model's folder"
            )
        glue = self._glue_text()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        first = self._encode(glue[0])[:1]
        self._end_token = first[0] if first and first[0] in special else None
        if self._end_token is not None:
            end_text = tokenizer.convert_ids_to_tokens(self._end_token)
            glue = (glue[0].partition(end_text)[2], glue[1])
        self._before_user, self._after_user = glue
        self._fast = self._fast_encoder(f"{glue[0]}{_USER_1} 1{glue[1]}")
        # What closes a demonstrated answer: the template's token where it has one.
        self.end_token_id = tokenizer.eos_token_id if self._end_token is None else self._end_token
        stops = {tokenizer.eos_token_id, self._end_token} - {None}
        if not stops:
            raise ConfigError(
                "the tokenizer has neither an eos token nor a special token after assistant "
                "messages; expected one, or answers would never stop: set eos_token"
            )
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(stops))

    def initial(self, messages: Sequence[Mapping[str, Any]]) -> TokenArray:
        """int32 ``[P]``: the chat with the opening of the assistant's answer."""
        return np.asarray(self._encode(self._render(messages)), np.int32)

    def extend(
        self, action_tokens: Sequence[int] | TokenArray, messages: Sequence[Message]
    ) -> TokenArray:
        """int32 ``[O]``: what comes between ``action_tokens`` and the next answer.

        The end-of-turn token is added where the action does not end with it (cut by length, or
        ended by another stop token).
        """
        (message,) = messages
        tokens = self._encode(f"{self._before_user}{message['content']}{self._after_user}")
        ended = len(action_tokens) > 0 and int(action_tokens[-1]) == self._end_token
        if self._end_token is not None and not ended:
            tokens = [self._end_token, *tokens]
        return np.asarray(tokens, np.int32)

    def decode_action(self, action_tokens: Sequence[int] | TokenArray) -> str:
        """The text of sampled tokens without special tokens."""
        ids = [int(token) for token in action_tokens]
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def encode_action(self, text: str) -> TokenArray:
        """int32 ``[A]``: a demonstrated answer with its end token.

        For supervised data only; sampled answers stay the tokens they are.
        """
        return np.asarray([*self._encode(text), self.end_token_id], np.int32)

    def _encode(self, text: str) -> list[int]:
        ids: list[int]
        if self._fast is not None:
            ids = self._fast.encode(text, add_special_tokens=False).ids
        else:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _fast_encoder(self, sample: str) -> Any:
        """The tokenizer's compiled part, where it gives the same tokens; else None.

        transformers spends several times as long around it as it takes itself.
        """
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        if fast is None or fast.truncation is not None or fast.padding is not None:
            return None
        same = fast.encode(sample, add_special_tokens=False).ids == self._encode(sample)
        return fast if same else None

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return text

    def _glue_text(self) -> tuple[str, str]:
        """The template's text (between an answer and the next user content, after that content)."""
        text = self._render(
            [
                {"role": "user", "content": _USER_1},
                {"role": "assistant", "content": _ASSISTANT},
                {"role": "user", "content": _USER_2},
            ]
        )
        _, found_answer, rest = text.partition(_ASSISTANT)
        before, found_user, after = rest.partition(_USER_2)
        if not (found_answer and found_user):
            raise ConfigError(
                f"the chat template does not render message contents as they are; got {text!r} for "
                f"contents {_USER_1}, {_ASSISTANT}, {_USER_2}"
            )
        return before, after


def next_tokens(
    renderer: ChatRenderer,
    view: AgentView,
    messages: Sequence[Mapping[str, Any]],
    past: Sequence[HistoryStep],
    answer: Sequence[int] | TokenArray,
    observation: str,
    info: Mapping[str, Any],
    window: int | None,
) -> TokenArray:
    """int32 ``[O]``: what the prompt of turn ``len(past)`` adds to the context.

    That is everything where prompts are rendered anew (``window`` steps of history each) and at the
    first turn; else what comes between ``answer``, the tokens of the last one, and the next.

    Args:
        renderer: of the policy's tokenizer.
        view: the environment's text as user messages.
        messages: the prompt's own, before the first user message.
        past: (observation, action) of every turn so far.
        answer: the tokens of the last answer; not read at the first turn.
        observation: the environment's latest text.
        info: the environment's latest info.
        window: steps of history; None for the full conversation.
    """
    turn = len(past)
    if window is None:
        new = view.full(observation, info, turn)
        if turn > 0:
            return renderer.extend(answer, new)
    else:
        first = past[0][0] if past else observation
        new = view.window(first, past[-window:], observation, info, turn)
    return renderer.initial([*messages, *new])
