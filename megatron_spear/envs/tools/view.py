"""How an environment with tools is shown: replies as ``tool`` messages, the answer taken whole."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_spear.envs.tools.parsing import parse_answer
from megatron_spear.envs.tools.tool import Tool
from megatron_spear.envs.views import AgentView, HistoryStep, ParsedAction, user_message
from megatron_spear.types import Message


class ToolView(AgentView):
    """Shows the task, then a message of role ``tool`` for each call of the last answer.

    Args:
        tools: those of the environment; the chat template lists their schemas.
        system: a system message before the task; a prompt with messages of its own needs none.
    """

    def __init__(self, tools: Sequence[Tool], system: str = "") -> None:
        self.tools = tuple(tool.schema() for tool in tools)
        self._system = system

    def full(self, observation: str, info: Mapping[str, Any], turn: int) -> tuple[Message, ...]:
        """The task; then the replies, or the observation where the last answer called nothing."""
        if turn == 0:
            return (*self._opening(), user_message(observation))
        replies: Sequence[str] = info.get("replies", ())
        return tuple(map(_tool_message, replies)) or (user_message(observation),)

    def window(
        self,
        first_observation: str,
        history: Sequence[HistoryStep],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> tuple[Message, ...]:
        """The task, the last answers without their thoughts, and what came back for each.

        Where answers are left out, the task's message says how many and what the last of them gave.
        """
        if turn == 0:
            return self.full(first_observation, info, 0)
        left_out = turn - len(history)
        task = first_observation
        if left_out:
            task += f"\n\n[{left_out} earlier turns left out; the last one gave:]\n{history[0][0]}"
        shown: list[Message] = [*self._opening(), user_message(task)]
        for index, (_, text) in enumerate(history):
            said = _without_thought(text)
            shown.append({"role": "assistant", "content": said})
            if index + 1 < len(history):
                seen = history[index + 1][0]
                shown.append(
                    _tool_message(seen) if parse_answer(said).calls else user_message(seen)
                )
        return (*shown, *self.full(observation, info, turn))

    def parse(self, text: str) -> ParsedAction:
        """The whole text; valid with well-formed calls, or without any and with an answer."""
        _, calls, content = parse_answer(text)
        valid = all(call.error is None for call in calls) if calls else self.answers(content)
        return ParsedAction(text, valid)

    def void(self, text: str) -> bool:
        """True without a call that can be read, unless it is an answer."""
        _, calls, content = parse_answer(text)
        if calls:
            return all(call.error is not None for call in calls)
        return not self.answers(content)

    def answers(self, content: str) -> bool:
        """Whether a text without calls and thoughts is a final answer: any but an empty one.

        A subclass may ask for a form, as the environment's ``finish`` does.
        """
        return bool(content)

    def demonstrate(self, action: str) -> str:
        """The text itself."""
        return action

    def _opening(self) -> tuple[Message, ...]:
        return ({"role": "system", "content": self._system},) if self._system else ()


def _tool_message(reply: str) -> Message:
    return {"role": "tool", "content": reply}


def _without_thought(text: str) -> str:
    """What follows the thought, or the whole text where that is nothing."""
    return text.rpartition("</think>")[2].strip() or text
