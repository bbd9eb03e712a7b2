"""The closed word list of ALFWorld: all that a game can say and a player can sensibly answer.

A tokenizer over it splits a text at white space and takes every punctuation mark as a word of its
own (`words.split_words`).
"""

import re

from megatron_spear.envs.alfworld.objective import SENTENCES, TASK_PREFIX
from megatron_spear.envs.alfworld.prompts import OfficialView
from megatron_spear.envs.alfworld.rules import ACTIONS, FEEDBACK, HELP_TEXT, INVALID_TEXT
from megatron_spear.envs.words import GENERIC_WORDS, PUNCTUATION, prompt_texts, split_words

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

_FIELD = re.compile(r"\[\{.*?\}\]|\{[^}]*\}|#[^#]+#")


def alfworld_words() -> tuple[str, ...]:
    """Every word and punctuation mark, sorted, each once, in upper and lower case as in the texts.

    Covers feedback, help, task sentences, possible actions, names with numbers up to `MAX_NUMBER`,
    and both prompt styles. An impossible action can hold other words ("dance").
    """
    words = {*PUNCTUATION, *map(str, range(1, MAX_NUMBER + 1)), "a", "and", "nothing"}
    texts = [_TYPE_NAMES, GENERIC_WORDS, TASK_PREFIX, HELP_TEXT, INVALID_TEXT]
    texts += [rhs for rules in FEEDBACK.values() for _, rhs in rules]
    texts += [action.template for action in ACTIONS.values()]
    texts += [form for forms in SENTENCES.values() for form in forms]
    texts += prompt_texts(OfficialView())
    for text in texts:
        words.update(split_words(_FIELD.sub(" ", text)))
    return tuple(sorted(words))
