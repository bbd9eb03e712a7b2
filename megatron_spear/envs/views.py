"""How an environment's text becomes chat messages, and a generated text an action."""

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


def void_action(text: str) -> bool:
    """True when no ``<action>...</action>`` follows the last ``</think>``.

    A thought is not required, an empty action counts as one, an action inside the thought does not.
    """
    _, opened, rest = text.rpartition("</think>")[2].partition("<action>")
    return not (opened and "</action>" in rest)


def has_cjk(text: str) -> bool:
    """Whether a CJK ideograph (U+3400-9FFF, compatibility forms included) occurs."""
    return any("\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" for c in text)
