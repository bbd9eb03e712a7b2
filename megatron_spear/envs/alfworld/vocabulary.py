"""The closed word list of ALFWorld: all that a game can say and a player can sensibly answer.

A tokenizer over it splits a text at white space and takes every character of `PUNCTUATION` as a
word of its own: "On the desk 1, you see" is ``On the desk 1 , you see``.
"""

import re

from megatron_spear.envs.alfworld.objective import SENTENCES, TASK_PREFIX
from megatron_spear.envs.alfworld.prompts import OfficialView
from megatron_spear.envs.alfworld.rules import ACTIONS, FEEDBACK, HELP_TEXT, INVALID_TEXT

PUNCTUATION = ".,:;'()[]<>/-=!?\""
MAX_NUMBER = 60  # names go to ``drawer 27``, the paper's prompt counts 50 steps

# Types of receptacles and objects of ALFWorld's domain, as they appear in names.
_TYPE_NAMES = """
alarmclock apple armchair baseballbat basketball bathtub bathtubbasin bed blinds book boots bowl
box bread butterknife cabinet candle cart cd cellphone chair cloth coffeemachine coffeetable
countertop creditcard cup curtains desk desklamp diningtable dishsponge drawer dresser egg
faucet floorlamp footstool fork fridge garbagecan glassbottle handtowel handtowelholder
houseplant kettle keychain knife ladle lamp laptop laundryhamper laundryhamperlid lettuce
lightswitch microwave mirror mug newspaper ottoman painting paintinghanger pan papertowel
papertowelroll pen pencil peppershaker pillow plate plunger poster pot potato remotecontrol safe
saltshaker scrubbrush shelf showercurtain showerdoor showerglass showerhead sidetable sink
sinkbasin soapbar soapbottle sofa spatula spoon spraybottle statue stoveburner stoveknob
teddybear television tennisracket tissuebox toaster toilet toiletpaper toiletpaperhanger
toiletpaperroll tomato towel towelholder tvstand vase watch wateringcan window winebottle
"""

# Left for reasoning in <think> and for prompts of other wordings.
_GENERIC_WORDS = """
about action actions active after agent all already also answer any are be because been before began
but by can cannot carry check choose completed current done each environment expert far final first
follow following found goal has have here history holding how I if inside interact it its known last
least let likely list lists may me more most must my need next no not now objects observation
observations of old once one only other our out over plan please possible present previous reason
reasoning recent result room rules same search seen should so step steps still tags taken tags task
that them then there these they thing things think this those time tried turn until was way we were
what when where which while why will within words would write yet you your
"""

_FIELD = re.compile(r"\[\{.*?\}\]|\{[^}]*\}|#[^#]+#")
_PIECE = re.compile(rf"[{re.escape(PUNCTUATION)}]|[^\s{re.escape(PUNCTUATION)}]+")


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of a text, in order."""
    return _PIECE.findall(text)


def alfworld_words() -> tuple[str, ...]:
    """Every word and punctuation mark, sorted, each once, in upper and lower case as in the texts.

    Covers feedback, help, task sentences, possible actions, names with numbers up to `MAX_NUMBER`,
    and both prompt styles. An impossible action can hold other words ("dance").
    """
    words = {*PUNCTUATION, *map(str, range(1, MAX_NUMBER + 1)), "a", "and", "nothing"}
    texts = [_TYPE_NAMES, _GENERIC_WORDS, TASK_PREFIX, HELP_TEXT, INVALID_TEXT]
    texts += [rhs for rules in FEEDBACK.values() for _, rhs in rules]
    texts += [action.template for action in ACTIONS.values()]
    texts += [form for forms in SENTENCES.values() for form in forms]
    texts += _official_prompts()
    for text in texts:
        words.update(split_words(_FIELD.sub(" ", text)))
    return tuple(sorted(words))


def _official_prompts() -> list[str]:
    """The paper's prompts with nothing filled in but counts, for the words around."""
    view, info = OfficialView(), {"admissible": ["look"]}
    messages = [
        *view.full("", info, 0),
        *view.full("", info, 1),
        *view.window("", [("", "")], "", info, 1),
    ]
    return [message["content"] for message in messages]
