"""The nouns of a product's title: by spaCy, as in the official code, or by a word list."""

import functools
import re
from collections.abc import Callable
from typing import Literal

from megatron_spear.errors import ConfigError

_MODEL = "en_core_web_sm"
_NOUN_TAGS = ("NOUN", "PROPN")
_WORD = re.compile(r"[^\W\d_]{2,}")

# Words of titles that are not nouns: function words, common adjectives, verbs and units.
_OTHER_WORDS = """
about above across adjustable after all also an and any are around as at automatic be before
best better big bigger black blue bright brown but by can cm comfortable compatible cool cute
dark deep durable each easy elegant every extra fashionable fast for free fresh from full fully
ft get great green grey gray has have heavy high hot how in inch inches into is it its large
light lightweight little long loose low made make mini mm more most multi natural new nice no
non not of off old on one only or organic original our out oz over own perfect pink plus
portable premium professional purple quick real red removable reusable round short simple slim
small smart soft solid square strong super than that the their them these they thick thin this
those to two ultra under up use used using very vintage warm waterproof wear when white wide
wireless with without xl xxl yellow you your
"""
_NOT_NOUNS = frozenset(_OTHER_WORDS.split())


@functools.cache
def noun_finder(kind: Literal["words", "spacy"]) -> Callable[[str], list[str]]:
    """What finds nouns: ``words`` needs nothing, ``spacy`` its small English model.

    Raises ConfigError where spaCy or its model is not installed.
    """
    return functools.lru_cache(maxsize=20_000)(_spacy_nouns() if kind == "spacy" else word_nouns)


def word_nouns(title: str) -> list[str]:
    """The words of a title that are none of a list of other words. Example: ``Fox Soft Leather
    Wallet, 2 Pack`` gives fox, leather, wallet, pack.

    spaCy takes nearly every capitalised word of a title as a proper noun, so both give much the
    same; they differ in rare adjectives and verbs, which count here, and in words with digits.
    """
    return [word for word in _WORD.findall(title.lower()) if word not in _NOT_NOUNS]


def _spacy_nouns() -> Callable[[str], list[str]]:
    try:
        import spacy

        model = spacy.load(_MODEL)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"env.nouns=spacy needs spaCy and its model {_MODEL} ({error}); install both (pip "
            f"install spacy; python -m spacy download {_MODEL}) or set env.nouns=words"
        ) from error
    return lambda title: [t.text.lower() for t in model(title) if t.pos_ in _NOUN_TAGS]
