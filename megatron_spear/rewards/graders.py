"""Outcome of a text answer: is the final answer in the text the known one?

| grader            | reads                       | compares                | gives     |
|-------------------|-----------------------------|-------------------------|-----------|
| `grade` (default) | the whole text              | meaning (`equivalent`)  | 1 or 0    |
| `official_strict` | the last 100 characters     | the string, exactly     | +1 or -1  |
| `official_minerva`| the last 300 characters     | Minerva's normal form   | +1 or -1  |
"""

import re
from typing import NamedTuple

from megatron_spear.rewards.answers import equivalent
from megatron_spear.rewards.minerva import minerva_normal_form

_OFFICIAL_CHARS = 300
_OFFICIAL_STRICT_CHARS = 100
_OFFICIAL_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_INVALID = "[INVALID]"

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(
    r"\b(?:final answer(?: is)?\b|answer(?=[\s*]{0,6}:))[\s*:]{1,10}([^\s*:][^\n]*)",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$([^$]+)\$")


class Graded(NamedTuple):
    """A score and the answer it was given for, as read from the text (None: none was found)."""

    score: float
    answer: str | None


def grade(text: str, truth: str) -> Graded:
    """1 when the text's final answer means ``truth``, else 0 (no answer found: 0).

    Where the answer stands in the text and how it is written do not matter.
    Example: ``... \\boxed{ \\dfrac{1}{2} } and so on for pages`` is right for ``0.5``.
    """
    answer = extract_answer(text)
    return Graded(float(answer is not None and equivalent(answer, truth)), answer)


def extract_answer(text: str) -> str | None:
    """The content of the last complete ``\\boxed{}``, else of the last ``Answer:`` line, else None.

    Nested braces are kept (``\\boxed{\\frac{1}{2}}`` gives ``\\frac{1}{2}``); a box that was never
    closed does not count, nor does an empty one. Time is linear in the text.
    """
    if boxed := _last_box(text):
        return boxed
    lines = _ANSWER_LINE.findall(text)
    if not lines:
        return None
    formula = _FORMULA.search(lines[-1])
    return (formula[1] if formula else lines[-1]).strip() or None


def official_strict(text: str, truth: str) -> Graded:
    """+1 when the last ``\\boxed{}`` of the last 100 characters is exactly ``truth``, else -1.

    Nothing is trimmed, and a last box that is not closed hides all earlier ones.
    """
    tail = text[-_OFFICIAL_STRICT_CHARS:]
    start = tail.rfind("\\boxed{")
    answer = None if start < 0 else _closed(tail, start + len("\\boxed{"))
    return Graded(1.0 if answer == truth else -1.0, answer)


def official_minerva(text: str, truth: str) -> Graded:
    """+1 when the last ``Answer: ...`` of the last 300 characters has ``truth``'s normal form.

    Else -1; without such a line the answer reads ``[INVALID]``.
    """
    lines = _OFFICIAL_ANSWER_LINE.findall(text[-_OFFICIAL_CHARS:])
    answer = minerva_normal_form(lines[-1] if lines else _INVALID)
    return Graded(1.0 if answer == minerva_normal_form(truth) else -1.0, answer)


def _last_box(text: str) -> str | None:
    """The box that opens last among the complete ones; escaped braces do not count as braces."""
    opened: list[int] = []  # where the content of each open brace starts; -1: not a box
    last, content = -1, None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = opened.pop() if opened else -1
            if start > last and text[start : token.start()].strip():
                last, content = start, text[start : token.start()]
        elif token[0].endswith("{") and token[0] != "\\{":
            opened.append(token.end() if token[0][0] == "\\" else -1)
    return content.strip() if content is not None else None


def _closed(text: str, start: int) -> str | None:
    """The text from ``start`` to the brace that closes the one before it; None if there is none."""
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at]
    return None
