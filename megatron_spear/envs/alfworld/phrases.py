"""Fixed pieces of ALFWorld's texts that a word-level tokenizer may take as one token each.

They shorten a tiny model's contexts to about half; decoding stays exact.
"""

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
