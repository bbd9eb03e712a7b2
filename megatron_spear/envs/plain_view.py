"""The environment's own words, and an action as the whole answer or inside a tag."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_spear.envs.views import (
    AgentView,
    HistoryStep,
    ParsedAction,
    behind_thought,
    last_between,
    user_message,
)
from megatron_spear.types import Message


class PlainView(AgentView):
    """Shows an observation as it is, each a user message.

    ``tag`` is where the action stands: ``answer`` means ``<answer>...</answer>``, the last complete
    pair behind the thought; without a tag it is the whole text behind ``</think>``. A thought that
    is never closed has no action.
    ``instruction`` is added to the first observation.

    Window form: the first observation, the last k steps as observation and action, the current
    observation, a line each::

        You are in the middle of a room. ... Your task is to: put some mug on desk.
        You arrive at desk 1. On the desk 1, you see nothing.
        go to shelf 1
        You arrive at shelf 1. On the shelf 1, you see a mug 2.
    """

    def __init__(self, tag: str | None = None, instruction: str = "") -> None:
        self._opening, self._closing = (f"<{tag}>", f"</{tag}>") if tag else ("", "")
        self._instruction = instruction

    def shown(self, observation: str, info: Mapping[str, Any]) -> str:
        """An observation after the first as the policy reads it; here, as it is."""
        return observation

    def full(self, observation: str, info: Mapping[str, Any], turn: int) -> tuple[Message, ...]:
        """The observation; at the start with the instruction."""
        text = self._first(observation) if turn == 0 else self.shown(observation, info)
        return (user_message(text),)

    def window(
        self,
        first_observation: str,
        history: Sequence[HistoryStep],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> tuple[Message, ...]:
        """First observation, last steps, current observation."""
        lines = [self._first(first_observation)]
        for index, (seen, action) in enumerate(history):
            # A history that reaches back to the start begins with line one's own step.
            starts_task = index == 0 and len(history) == turn
            lines += [action] if starts_task else [self.shown(seen, info), action]
        if turn:
            lines.append(self.shown(observation, info))
        return (user_message("\n".join(lines)),)

    def parse(self, text: str) -> ParsedAction:
        """The action, stripped; invalid where it is empty or has no tag."""
        answer = behind_thought(text)
        if self._opening:
            found = last_between(answer, self._opening, self._closing)
            action = (found or "").strip()
            return ParsedAction(action, found is not None and bool(action))
        return ParsedAction(answer.strip(), bool(answer.strip()))

    def void(self, text: str) -> bool:
        """True where nothing is answered behind the thought."""
        answer = behind_thought(text)
        if self._opening:
            return last_between(answer, self._opening, self._closing) is None
        return not answer.strip()

    def demonstrate(self, action: str) -> str:
        """The action in its form."""
        return f"{self._opening}{action}{self._closing}"

    def _first(self, observation: str) -> str:
        return f"{observation}\n{self._instruction}" if self._instruction else observation
