"""The prompts of one attempt, turn by turn, and where a context ends and another begins.

Rollouts and demonstrations go through it alike, so both give the same segments.

| ``env.history`` | the prompt of a turn                     | a segment (context) is       |
|-----------------|------------------------------------------|------------------------------|
| ``full``        | the tokens so far and the new messages   | the whole conversation       |
| ``window``      | the task and the last steps, anew        | one turn                     |
| ``rendered``    | the whole conversation, rendered anew    | turns that extend each other |

``rendered`` is what a server of chat messages does. A template may rewrite what was said (Qwen3
drops old thoughts), and text may be tokenised otherwise than it was sampled. So each prompt is
compared with the tokens so far: where it begins with them, the turn extends its segment, else it
branches. Either way what is trained on is what the engine was given and sampled.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_spear.config.environments.base import History, WindowHistory
from megatron_spear.envs.views import AgentView, HistoryStep
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.types import Message, TokenArray


class NextPrompt(NamedTuple):
    """What the engine gets, int32 ``[P]``, and what of it is new to the segment, int32 ``[O]``.

    Example: tokens so far ``[5, 6, 9]``. A prompt ``[5, 6, 9, 7]`` adds ``[7]``; a prompt
    ``[5, 6, 7]`` begins a segment, to which all of it is new.
    """

    token_ids: TokenArray
    new_tokens: TokenArray
    begins_segment: bool


class Conversation:
    """One attempt's. Call ``next_prompt`` and ``answered`` in turn.

    Args:
        renderer: of the policy's tokenizer.
        view: the environment's text as messages.
        messages: the prompt's own, before the first observation.
        history: ``env.history``.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        view: AgentView,
        messages: Sequence[Message],
        history: History,
    ) -> None:
        self._renderer, self._view, self._history = renderer, view, history
        self._messages: list[Message] = list(messages)  # all so far, where they are rendered anew
        self._past: list[HistoryStep] = []
        self._observation = ""
        # The tokens of the last prompt, then of its answer too.
        self._context: TokenArray = np.zeros(0, np.int32)
        self._answer: TokenArray = np.zeros(0, np.int32)

    def next_prompt(self, observation: str, info: Mapping[str, Any]) -> NextPrompt:
        """The prompt for the environment's latest text and info."""
        self._observation = observation
        if isinstance(self._history, WindowHistory):
            prompt = self._windowed(self._history.window, observation, info)
        else:
            new = self._view.full(observation, info, len(self._past))
            prompt = self._grown(new)
        self._context = prompt.token_ids
        return prompt

    def answered(self, tokens: TokenArray, action: str) -> None:
        """Take the answer, int32 ``[A]``, and the action that was read in it."""
        self._past.append((self._observation, action))
        if self._history == "rendered":
            opening = self._renderer.opening(self._context)
            said = opening + self._renderer.decode_action(tokens)
            self._messages.append({"role": "assistant", "content": said})
        self._answer = tokens
        self._context = np.concatenate([self._context, tokens])

    def _grown(self, new: Sequence[Message]) -> NextPrompt:
        """The prompt of a conversation that keeps all its turns."""
        if self._past and self._history == "full":
            return self._extended(self._renderer.extend(self._answer, new))
        self._messages += new
        rendered = self._renderer.initial(self._messages, self._view.tools)
        size = len(self._context)
        if self._past and np.array_equal(rendered[:size], self._context):
            return self._extended(rendered[size:])
        return NextPrompt(rendered, rendered, True)

    def _extended(self, new_tokens: TokenArray) -> NextPrompt:
        return NextPrompt(np.concatenate([self._context, new_tokens]), new_tokens, False)

    def _windowed(self, window: int, observation: str, info: Mapping[str, Any]) -> NextPrompt:
        turn = len(self._past)
        first = self._past[0][0] if self._past else observation
        shown = self._view.window(first, self._past[-window:], observation, info, turn)
        tokens = self._renderer.initial([*self._messages, *shown], self._view.tools)
        return NextPrompt(tokens, tokens, True)
