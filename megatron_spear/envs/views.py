"""How an environment's text becomes chat messages, and a generated text an action."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from megatron_spear.types import Message

# Each step of a window: what was seen, and the action taken on seeing it.
HistoryStep = tuple[str, str]


class ParsedAction(NamedTuple):
    """The action for the environment, and whether the text kept to the asked form.

    The environment gets ``action`` in any case; an invalid form may cost a format penalty.
    """

    action: str
    valid: bool


class AgentView(Protocol):
    """Both directions for one environment and one prompt style. Pure: no state between calls.

    A generated text is a whole answer: where the chat template opens the thought, it begins with
    the template's ``<think>``, which the policy did not sample.

    ``turn`` is the 0-based number of the turn that is asked for, so it is also the number of
    actions taken so far. ``info`` is the environment's latest info.
    """

    needs_admissible: bool = False
    """Whether ``info["admissible"]`` is read; the rollouter then asks for it at reset."""

    tools: Sequence[Mapping[str, Any]] = ()
    """What can be called, as OpenAI function schemas; the chat template lists them."""

    def full(self, observation: str, info: Mapping[str, Any], turn: int) -> tuple[Message, ...]:
        """What a conversation that keeps all earlier turns gets after its last answer: one user
        message, or one message of role ``tool`` for each call of that answer."""
        ...

    def window(
        self,
        first_observation: str,
        history: Sequence[HistoryStep],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> tuple[Message, ...]:
        """The messages of a prompt that is rendered anew each turn, one of the user's as a rule.

        ``history`` holds the last k (observation, action) pairs, oldest first, fewer early on.
        """
        ...

    def parse(self, text: str) -> ParsedAction:
        """The action in a generated text; never raises."""
        ...

    def void(self, text: str) -> bool:
        """Whether a generated text neither acts nor answers, so that nothing is learned from it.

        This is about the form alone: an action that is impossible in the environment is not void.
        """
        ...

    def demonstrate(self, action: str) -> str:
        """The text a policy should generate to take ``action``; ``parse`` gives it back, valid."""
        ...


def user_message(content: str) -> Message:
    """What the user says."""
    return {"role": "user", "content": content}


def last_between(text: str, opening: str, closing: str) -> str | None:
    """The text inside the last complete ``opening``..``closing`` pair, or None.

    Example: ``last_between("<a>x</a> <a>y</a> <a>z", "<a>", "</a>")`` is ``"y"``.
    """
    end = text.rfind(closing)
    if end < 0:
        return None
    start = text.rfind(opening, 0, end)
    return None if start < 0 else text[start + len(opening) : end]


def behind_thought(text: str) -> str:
    """What stands outside the thought: behind the last ``</think>``, and before a ``<think>`` that
    is never closed (a thought that was cut by its length).

    Example: ``"<think>a</think> go"`` gives ``" go"``, ``"<think>go"`` gives ``""``.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


def void_action(text: str) -> bool:
    """True when no ``<action>...</action>`` follows the last ``</think>``.

    A thought is not required, an empty action counts as one, an action inside the thought does not.
    """
    _, opened, rest = text.rpartition("</think>")[2].partition("<action>")
    return not (opened and "</action>" in rest)


def has_cjk(text: str) -> bool:
    """Whether a CJK ideograph (U+3400-9FFF, compatibility forms included) occurs."""
    return any("\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" for c in text)


class TaggedView(AgentView):
    """The paper's prompt: task, step count, last steps, possible actions, <think> and <action>.

    Invalid is a text without a complete ``<think>`` or ``<action>`` pair or with CJK characters
    (SPEAR, arXiv 2509.22601). The action is the content of the last complete ``<action>`` pair.
    """

    lowers_case = True
    """Whether actions are lower-cased: False where the environment does not look at case."""

    needs_admissible = True
    role: str
    """The first line: who the policy is."""

    @abstractmethod
    def opening(self, observation: str, info: Mapping[str, Any]) -> Sequence[str]:
        """The task and the first observation, as lines."""

    @abstractmethod
    def task(self, first_observation: str, info: Mapping[str, Any]) -> str:
        """The task alone."""

    def shown(self, observation: str, info: Mapping[str, Any]) -> str:
        """An observation after the first as the policy reads it; here, as it is."""
        return observation.strip()

    def full(self, observation: str, info: Mapping[str, Any], turn: int) -> tuple[Message, ...]:
        """Rules, task and first observation in turn 0; then what is seen and what is possible."""
        if turn == 0:
            opening = self.opening(observation, info)
            lines = [self.role, *opening, possible_actions(info), _ANSWER_FORM]
        else:
            seen = f"After action {turn}: {self.shown(observation, info)}"
            lines = [seen, possible_actions(info), _REMINDER]
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
            f"[{first + index + 1}] you saw: {self.shown(seen, info)}\n    you did: {action}"
            for index, (seen, action) in enumerate(history)
        ]
        lines = [
            self.role,
            f"{TASK_MARK} {self.task(first_observation, info)}",
            f"Actions taken so far: {turn}. The most recent {len(history)}:",
            *steps,
            f"You are at step {turn + 1} and now see: {self.shown(observation, info)}",
            possible_actions(info),
            _ANSWER_FORM,
        ]
        return (user_message("\n".join(lines)),)

    def parse(self, text: str) -> ParsedAction:
        """The last complete action on one line; "" where there is none."""
        action = last_between(text, "<action>", "</action>")
        valid = (
            action is not None
            and last_between(text, "<think>", "</think>") is not None
            and not has_cjk(text)
        )
        text = " ".join((action or "").split())
        return ParsedAction(text.lower() if self.lowers_case else text, valid)

    def void(self, text: str) -> bool:
        """True without a complete action after the thought."""
        return void_action(text)

    def demonstrate(self, action: str) -> str:
        """The action behind a thought that names it."""
        return f"<think>The next thing to do is: {action}.</think><action>{action}</action>"


TASK_MARK = "Your task is to:"
_REMINDER = "Reason in <think> </think>, then give one action in <action> </action>."
_ANSWER_FORM = (
    "First reason step by step about what you see and what to do, inside <think> </think>. "
    "Then pick exactly one of the possible actions and write it inside <action> </action>."
)


def possible_actions(info: Mapping[str, Any]) -> str:
    """The line that lists the possible actions; ``help`` is none of them."""
    actions = [action for action in info.get("admissible", ()) if action != "help"]
    return "Possible actions now: " + ", ".join(f"'{action}'" for action in actions)
