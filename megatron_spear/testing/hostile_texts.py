"""Texts that a model might generate and nobody would wish for, to try parsers and environments on.

    for number in range(1000):
        environment.step(hostile_text(number))

Text ``number`` is the same on every machine, so a failure is named by its number.
"""

import json
import random
from collections.abc import Callable
from typing import Any

_PIECES = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *(
        "<action>",
        "</action>",
        "<answer>",
        "<code>",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<r>",
    ),
    *("```python\n", "```", "\\boxed{", "}", "{", "[", "]", '"', "'", "\\", ":", ",", "\n", " "),
    *("Answer: ", "Final answer", "\\frac{1}{2}", "$", "1e999", "NaN", "-0", "9" * 400, "null"),
    *('{"name": "price", ', '"arguments": ', '{"item": "fig"}', '"parameters": ', "\\u0000"),
    *("\\ud800", "go to desk 1", "take mug 1 from desk 1", "search[", "click[", "Buy Now", "look"),
    *("\x00", "\ud800", "\udfff", "\u202e", "\u200f\u05e9\u05dc", "\ufeff", "e\u0301" * 3, "左"),
    *("\N{GRINNING FACE}", "\r\n", "\t", "\x1b[2J", "../../etc/passwd", "%s%n", "{0.__class__}"),
)
_PRICE = '{"name": "price", "arguments": {"item": "fig"}}'
_ANSWERS = (
    f"<think>\nlet me see\n</think>\n\n<tool_call>\n{_PRICE}\n</tool_call>",
    '<tool_call>{"name": "multiply", "arguments": {"a": 3, "b": 4}}</tool_call>' * 2,
    '{"name": "price", "parameters": {"item": "pear"}}',
    "<think>The next thing is the desk.</think><action>go to desk 1</action>",
    "<think>a</think><action>search[red shoe]</action>",
    '<tool_call>{"name": "code_interpreter", "arguments": {"code": "print(1)\\n"}}</tool_call>',
    "So the answer is \\boxed{\\frac{3}{4}}.",
    "go to shelf 1",
    "42",
)
_RANGES = (
    *((0, 0x20), (0x20, 0x7F), (0x80, 0x2FF), (0x590, 0x6FF), (0x2000, 0x206F)),
    *((0x4E00, 0x4F00), (0xD800, 0xDFFF), (0xFFF0, 0xFFFF), (0x1F300, 0x1F6FF), (0, 0x10FFFF)),
)
_BRACKETS = (
    *(("<think>", "</think>"), ("<tool_call>", "</tool_call>"), ("<action>", "</action>")),
    *(("[", "]"), ('{"a":', "}"), ("\\boxed{", "}"), ("\\frac{", "}{1}"), ("(", ")")),
)
_HUGE_EVERY = 499  # a prime, so that every n-th text is as often huge


def hostile_text(number: int) -> str:
    """Text ``number`` of an endless list: short ones, and one in 499 of up to a megabyte."""
    rng = random.Random(number)
    if number % _HUGE_EVERY == _HUGE_EVERY - 1:
        return _huge(rng)
    return rng.choice(_KINDS)(rng)


def _bytes(rng: random.Random) -> str:
    """Random bytes, as decoders hand them on."""
    raw = rng.randbytes(rng.randrange(1, 120))
    return raw.decode("utf-8", rng.choice(("replace", "ignore", "surrogateescape")))


def _characters(rng: random.Random) -> str:
    """Characters of a few blocks: controls, right-to-left, surrogates, signs."""
    low, high = rng.choice(_RANGES)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(30)))


def _pieces(rng: random.Random) -> str:
    """Tags and fragments in any order."""
    return "".join(rng.choices(_PIECES, k=rng.randrange(1, 25)))


def _damaged(rng: random.Random) -> str:
    """A good answer with some of it left out, said twice, or replaced."""
    text = rng.choice(_ANSWERS)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.randrange(1, 30))
        middle = rng.choice(("", text[start:stop] * 2, rng.choice(_PIECES), text[start:stop][::-1]))
        text = text[:start] + middle + text[stop:]
    return text


def _call(rng: random.Random) -> str:
    """A call whose JSON is right and whose contents are not."""
    value = {"name": _value(rng, 1), "arguments": _value(rng, 3)}
    if rng.random() < 0.7:
        value["name"] = rng.choice(("price", "multiply", "code_interpreter", "search", ""))
    if rng.random() < 0.5:
        names = rng.sample(("item", "a", "b", "code", "self", "__class__", ""), k=2)
        value["arguments"] = {name: _value(rng, 2) for name in names}
    return f"<tool_call>{json.dumps(value, ensure_ascii=rng.random() < 0.5)}</tool_call>"


def _value(rng: random.Random, depth: int) -> Any:
    """Any JSON value, Python's NaN and big numbers included."""
    kind = rng.randrange(9 if depth else 7)
    if kind == 7:
        return [_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {_characters(rng): _value(rng, depth - 1) for _ in range(rng.randrange(4))}
    simple = (None, True, rng.randrange(-9, 99), 10 ** rng.randrange(400), rng.random(), "fig")
    return _characters(rng) if kind == 6 else simple[kind]


def _nested(rng: random.Random) -> str:
    """The same opening many times over, now and then closed."""
    opening, closing = rng.choice(_BRACKETS)
    depth = rng.choice((3, 30, 300, 3000))
    text = opening * depth + rng.choice(_PIECES) + closing * rng.choice((0, 1, depth, depth + 1))
    return f"<tool_call>{text}</tool_call>" if rng.random() < 0.3 else text


def _huge(rng: random.Random) -> str:
    """One piece, or an answer, over and over."""
    unit = rng.choice((_pieces, _damaged, _characters, _call))(rng) or "a"
    return unit * (rng.choice((10_000, 100_000, 1_000_000)) // len(unit) + 1)


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    *(_bytes, _characters, _pieces, _pieces, _damaged, _damaged, _damaged, _call, _call),
    _nested,
)
