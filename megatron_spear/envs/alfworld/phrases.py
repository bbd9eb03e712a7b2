"""Pieces of ALFWorld's texts that a word-level tokenizer may take as one token each.

They shorten a tiny model's contexts to a third; decoding stays exact.
"""

from megatron_spear.envs.alfworld.rooms import LAMP, ROOM_FIXTURES, ROOM_HABITS

_MOST_OBJECTS = 5  # objects of one type that get a name of their own; more are two tokens

PHRASES = (
    "You are in the middle of a room. Looking quickly around you, you see a",
    "Your task is to:",
    "You arrive at",
    "You open the",
    "You close the",
    "You pick up the",
    "You move the",
    "You clean the",
    "You heat the",
    "You cool the",
    "You turn on the",
    "You are carrying: a",
    "You are not carrying anything.",
    "You are facing the",
    "Next to it, you see",
    "There's nothing special about",
    "Nothing happens.",
    "is closed.",
    "is open. In it, you see a",
    "is open. In it, you see nothing.",
    ". On the",
    ". The",
    ", you see a",
    ", you see nothing.",
    ", and a",
    ", a",
    "from the",
    "to the",
    "using the",
    "go to",
)


def _names() -> tuple[str, ...]:
    most = {kind: _MOST_OBJECTS for habits in ROOM_HABITS.values() for kind in habits}
    most[LAMP] = _MOST_OBJECTS
    for fixtures in ROOM_FIXTURES.values():
        for kind, fixture in fixtures.items():
            most[kind] = max(most.get(kind, 1), fixture.most)
    return tuple(
        f"{kind.lower()} {number}" for kind in sorted(most) for number in range(1, most[kind] + 1)
    )


NAMES = _names()
