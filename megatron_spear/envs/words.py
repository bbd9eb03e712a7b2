"""What the word lists of tiny models' tokenizers are made of."""

import re

from megatron_spear.envs.views import AgentView

PUNCTUATION = ".,:;'()[]<>/-=!?\""

# Left for reasoning in <think> and for prompts of other wordings.
GENERIC_WORDS = """
about action actions active after agent all already also answer any are be because been before began
but by can cannot carry check choose completed current done each environment expert far final first
follow following found goal has have here history holding how I if inside interact it its known last
least let likely list lists may me more most must my need next no not now objects observation
observations of old once one only other our out over plan please possible present previous reason
reasoning recent result room rules same search seen should so step steps still tags taken tags task
that them then there these they thing things think this those time tried turn until was way we were
what when where which while why will within words would write yet you your
"""

_PIECE = re.compile(rf"[{re.escape(PUNCTUATION)}]|[^\s{re.escape(PUNCTUATION)}]+")


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of a text, in order.

    Example: ``On the desk 1, you see`` is ``On the desk 1 , you see``.
    """
    return _PIECE.findall(text)


def prompt_texts(view: AgentView) -> list[str]:
    """A view's prompts with nothing filled in but counts, for the words around."""
    info = {"admissible": ["look"]}
    messages = [
        *view.full("", info, 0),
        *view.full("", info, 1),
        *view.window("", [("", "")], "", info, 1),
    ]
    return [message["content"] for message in messages]
