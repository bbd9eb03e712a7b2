"""The two prompt styles of ALFWorld: ``compact`` for small models, ``official`` as in the paper."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_spear.envs.views import (
    AgentView,
    HistoryStep,
    ParsedAction,
    has_cjk,
    last_between,
    user_message,
    void_action,
)
from megatron_spear.types import Message

_TASK_MARK = "Your task is to:"


def alfworld_view(style: Literal["compact", "official"]) -> AgentView:
    """The view of ``env.prompt``."""
    return {"compact": CompactView, "official": OfficialView}[style]()


class CompactView(AgentView):
    """The game's own words and nothing else; the whole answer is the action.

    The window form has one text a line: the first observation (it lists the places and the task),
    the last k steps as observation and action, and the current observation::

        You are in the middle of a room. ... Your task is to: put some mug on desk.
        You arrive at desk 1. On the desk 1, you see nothing.
        go to shelf 1
        You arrive at shelf 1. On the shelf 1, you see a mug 2.
    """

    needs_admissible = False

    def full(self, observation: str, info: Mapping[str, Any], turn: int) -> tuple[Message, ...]:
        """The observation as it is."""
        return (user_message(observation),)

    def window(
        self,
        first_observation: str,
        history: Sequence[HistoryStep],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> tuple[Message, ...]:
        """First observation, last steps, current observation."""
        if turn == 0:
            return (user_message(first_observation),)
        lines = [first_observation]
        for index, (seen, action) in enumerate(history):
            # A history that reaches back to the start begins with line one's own step.
            starts_game = index == 0 and len(history) == turn
            lines += [action] if starts_game else [seen, action]
        return (user_message("\n".join([*lines, observation])),)

    def parse(self, text: str) -> ParsedAction:
        """The text, stripped; only an empty one is invalid."""
        action = text.strip()
        return ParsedAction(action, bool(action))

    def void(self, text: str) -> bool:
        """True for an empty text."""
        return not text.strip()

    def demonstrate(self, action: str) -> str:
        """The action itself."""
        return action


class OfficialView(AgentView):
    """The paper's prompt: task, step count, last steps, possible actions, <think> and <action>.

    Invalid is a text without a complete ``<think>`` or ``<action>`` pair or with CJK characters
    (SPEAR, arXiv 2509.22601). The action is the content of the last complete ``<action>`` pair,
    lower-cased.
    """

    needs_admissible = True

    def full(self, observation: str, info: Mapping[str, Any], turn: int) -> tuple[Message, ...]:
        """Rules, task and first observation in turn 0; then what is seen and what is possible."""
        if turn == 0:
            lines = [_ROLE, observation.strip(), _possible(info), _ANSWER_FORM]
        else:
            lines = [f"After action {turn}: {observation.strip()}", _possible(info), _REMINDER]
        return (user_message("\n".join(lines)),)

    def window(
        self,
        first_observation: str,
        history: Sequence[HistoryStep],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> tuple[Message, ...]:
        """Everything anew, with the last k steps written out."""
        if turn == 0:
            return self.full(first_observation, info, 0)
        first = turn - len(history)
        steps = [
            f"[{first + index + 1}] you saw: {seen.strip()}\n    you did: {action}"
            for index, (seen, action) in enumerate(history)
        ]
        lines = [
            _ROLE,
            f"{_TASK_MARK} {task_of(first_observation)}",
            f"Actions taken so far: {turn}. The most recent {len(history)}:",
            *steps,
            f"You are at step {turn + 1} and now see: {observation.strip()}",
            _possible(info),
            _ANSWER_FORM,
        ]
        return (user_message("\n".join(lines)),)

    def parse(self, text: str) -> ParsedAction:
        """The last complete action, lower-cased and on one line; "" where there is none."""
        action = last_between(text, "<action>", "</action>")
        valid = (
            action is not None
            and last_between(text, "<think>", "</think>") is not None
            and not has_cjk(text)
        )
        return ParsedAction(" ".join((action or "").lower().split()), valid)

    def void(self, text: str) -> bool:
        """True without a complete action after the thought."""
        return void_action(text)

    def demonstrate(self, action: str) -> str:
        """The action behind a thought that names it."""
        return f"<think>The next thing to do is: {action}.</think><action>{action}</action>"


_ROLE = "You act in a household text game (ALFRED, embodied) and must finish one task."
_REMINDER = "Reason in <think> </think>, then give one action in <action> </action>."
_ANSWER_FORM = (
    "First reason step by step about what you see and what to do, inside <think> </think>. "
    "Then pick exactly one of the possible actions and write it inside <action> </action>."
)


def task_of(first_observation: str) -> str:
    """What follows ``Your task is to:``; the whole text where the mark is missing.

    Example: ``"You are ...\\n\\nYour task is to: put a mug in desk."`` gives ``"put a mug in
    desk."``.
    """
    _, mark, task = first_observation.partition(_TASK_MARK)
    return task.strip() if mark else first_observation.strip()


def _possible(info: Mapping[str, Any]) -> str:
    actions = [action for action in info.get("admissible", ()) if action != "help"]
    return "Possible actions now: " + ", ".join(f"'{action}'" for action in actions)
