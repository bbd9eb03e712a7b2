"""The two prompt styles of WebShop: ``compact`` for small models, ``official`` as in the paper."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_spear.envs.plain_view import PlainView
from megatron_spear.envs.views import (
    TASK_MARK,
    AgentView,
    ParsedAction,
    TaggedView,
)
from megatron_spear.envs.webshop.pages import SEPARATOR


def webshop_view(style: Literal["compact", "official"]) -> AgentView:
    """The view of ``env.prompt``."""
    return CompactView() if style == "compact" else OfficialView()


class CompactView(PlainView):
    """The pages and nothing else. The first has the instruction, the others are shown without
    it::

        WebShop [SEP] Instruction: [SEP] i need a red shirt [SEP] Search
        search[ red shirt ]
        Back to Search [SEP] Page 1 (Total results: 50) [SEP] Next > [SEP] B09KP78G37 [SEP] ...

    Demonstrated actions have spaces inside the brackets, so that a word of a page is the same
    token in an action; they do not count.
    """

    def shown(self, observation: str, info: Mapping[str, Any]) -> str:
        """The page without the instruction."""
        return without_instruction(observation, info)

    def parse(self, text: str) -> ParsedAction:
        """The text, without spaces at its ends and at those of what is in the brackets."""
        verb, bracket, rest = text.strip().partition("[")
        inner, closing, after = rest.rpartition("]")
        action = f"{verb}[{inner.strip()}]{after}" if closing else verb + bracket + rest
        return ParsedAction(action, bool(action))

    def demonstrate(self, action: str) -> str:
        """The action, its argument between spaces."""
        verb, _, rest = action.partition("[")
        return f"{verb}[ {rest.removesuffix(']')} ]"


class OfficialView(TaggedView):
    """The paper's prompt; strings of a page stand in quotes, as in the released code::

    'Back to Search' [SEP] 'Page 1 (Total results: 50)' [SEP] 'Next >' [SEP] 'B09KP78G37'
    """

    lowers_case = False
    role = "You act in an online shop (WebShop) and must buy what one instruction asks for."

    def opening(self, observation: str, info: Mapping[str, Any]) -> Sequence[str]:
        """The instruction and the first page."""
        task = self.task(observation, info)
        return [f"{TASK_MARK} {task}", f"You now see: {self.shown(observation, info)}"]

    def task(self, first_observation: str, info: Mapping[str, Any]) -> str:
        """The instruction."""
        return str(info.get("task", "")).strip()

    def shown(self, observation: str, info: Mapping[str, Any]) -> str:
        """The page without the instruction, its strings in quotes."""
        page = without_instruction(observation, info).strip()
        if SEPARATOR not in page:
            return page
        return SEPARATOR.join(f"'{part}'" for part in page.split(SEPARATOR))


def without_instruction(observation: str, info: Mapping[str, Any]) -> str:
    """A page without the instruction (``info["task"]``) that stands on each, in both modes."""
    task = str(info.get("task", ""))
    for separator, text in ((SEPARATOR, task.strip()), ("\n", task)):
        mark = f"Instruction:{separator}{text}{separator}"
        if mark in observation:
            return observation.replace(mark, "", 1)
    return observation
