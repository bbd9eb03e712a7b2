"""Whether two final answers mean the same: exact arithmetic for numbers, spelling for the rest.

Tolerant of how an answer is written (spaces, LaTeX wrappers, thousands separators, units), never of
its value: 0.5 is 1/2, but 0.333 is not 1/3. A computer algebra system is not involved, so ``x + 1``
and ``1 + x`` differ.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import starmap

# What is longer is compared as it stands: no answer needs it, and exact arithmetic on hundreds of
# digits is a way to stall the grader.
_MAX_CHARS = 200
_MAX_EXPONENT = 100
_MAX_ITEMS = 30

_CHARACTERS = str.maketrans({"−": "-", "–": "-", "\u00a0": " ", "π": "\\pi", "°": "^\\circ"})
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr)(?![A-Za-z])|\\[!,;:]")
_FRACTION_SHORT = re.compile(r"\\frac\s*(\d)\s*(?:(\d)|\{([^{}]*)\})")
_ENDS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|boxed|fbox)\s*\{([^{}]*)\}"
)
_ASSIGNMENT = re.compile(r"[A-Za-z](?:_\w|_\{\w+\})?\s*=\s*(?=\S)")
_CHOICE = re.compile(r"\(([A-Za-z])\)")

_N = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:"
    rf"(?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<top>-?{_N})\s*\}}\s*\{{\s*(?P<bottom>-?{_N})\s*\}}"
    rf"|(?P<units>\d+)\s+(?P<over>[1-9]\d*)\s*/\s*(?P<under>[1-9]\d*)"
    rf"|(?P<a>{_N})\s*/\s*(?P<b>{_N})"
    rf"|(?P<mantissa>{_N})(?:\s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*|[eE](?=[+-]?\d))"
    rf"\{{?\s*(?P<exponent>[+-]?\d+)\s*\}}?"
    rf"|(?P<plain>{_N}))"
)
_BLANK_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?: \d{3})+")
_POWER = re.compile(r"\s*\^\s*\{?\s*([23])\s*\}?$")
_DEGREES = re.compile(r"\^?\s*\{?\s*\\circ\s*\}?")
_PLURALS = {"feet": "ft", "foot": "ft", "inches": "inch", "inche": "inch", "%": "percent"}
_LONG_UNITS = {
    "m": "meter",
    "cm": "centimeter",
    "mm": "millimeter",
    "km": "kilometer",
    "metre": "meter",
    "centimetre": "centimeter",
    "millimetre": "millimeter",
    "kilometre": "kilometer",
    "mi": "mile",
    "mph": "mile per hour",
    "g": "gram",
    "kg": "kilogram",
    "lb": "pound",
    "oz": "ounce",
    "l": "liter",
    "litre": "liter",
    "ml": "milliliter",
    "millilitre": "milliliter",
    "h": "hour",
    "hr": "hour",
    "min": "minute",
    "s": "second",
    "sec": "second",
    "usd": "dollar",
    "sq": "square",
}
_POWERS = {"square": "2", "cubic": "3"}
_KNOWN_UNITS = """
percent degree unit square cubic point dollar cent digit integer people student way
meter metre centimeter kilometer mile yard ft inch km cm mm mph
gram kilogram kg pound ounce liter litre ml hour hr minute min second day week month year
"""
_UNIT_WORDS = frozenset(_KNOWN_UNITS.split())


def equivalent(answer: str, truth: str) -> bool:
    """True when both are the same number, the same list of numbers, or the same text.

    - Numbers: ``0.5``, ``1/2``, ``\\frac12`` and ``\\dfrac{1}{2}``; ``1,000``, ``1{,}000``,
      ``1 000`` and ``10^3`` with a factor; mixed ``1\\frac{1}{2}`` and ``1 1/2``. Units may be
      missing on one side (``42`` is ``42\\text{ cm}``, ``50`` is ``50\\%``) but not differ.
    - Lists: item by item; ``(1,2)`` is ordered, ``\\{1,2\\}`` and a bare ``1, 2`` are not.
    - Text: without wrappers, spaces (but those between two digits) and, for plain words, case. An
      empty answer never matches.
    """
    if max(len(answer), len(truth)) > _MAX_CHARS:
        return answer.strip() == truth.strip() != ""
    left, right = cleaned(answer), cleaned(truth)
    if not left or not right:
        return False
    if _same_item(left, right):
        return True
    return _same_list(left, right)


def cleaned(text: str) -> str:
    """The answer without layout commands, delimiters, outer wrappers, ``x =`` and a full stop."""
    text = _LAYOUT.sub("", text.translate(_CHARACTERS).replace("\\ ", " ").replace("{,}", ","))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _FRACTION_SHORT.sub(
        lambda found: f"\\frac{{{found[1]}}}{{{found[2] or found[3]}}}", text
    )
    before = None
    while text != before:  # each round removes characters, so it ends
        before = text
        text = text.strip().removesuffix(".").strip("*").strip()
        for start, end in _ENDS:
            inner = text[len(start) : len(text) - len(end)]
            if text == start + inner + end and start not in inner and end not in inner:
                text = inner
        if wrapped := _WRAPPER.fullmatch(text):
            text = wrapped[1]
        text = _ASSIGNMENT.sub("", text, count=1) if _ASSIGNMENT.match(text) else text
    return text


def as_number(text: str) -> tuple[Fraction, str] | None:
    """The exact value and the unit ("" where none) of a cleaned answer; None for anything else."""
    if _BLANK_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    money = text.startswith(("\\$", "$"))
    body = text.lstrip("\\$").strip() if money else text
    found = _NUMBER.match(body)
    value = _value(found) if found else None
    if found is None or value is None:
        return None
    rest = body[found.end() :].strip()
    unit = _unit(rest) if rest else ""
    if unit is None:
        return None
    return value, unit or ("dollar" if money else "")


def _value(found: re.Match[str]) -> Fraction | None:
    """The number a match of ``_NUMBER`` writes; None for a zero denominator or a huge exponent."""
    part = {name: text.replace(",", "") for name, text in found.groupdict().items() if text}
    if "top" in part:
        parts = (part["top"], part["bottom"])
    elif "units" in part:
        parts = (part["over"], part["under"])
    else:
        parts = (part.get("a") or part.get("mantissa") or part["plain"], part.get("b", "1"))
    top, bottom = Fraction(parts[0]), Fraction(parts[1])
    exponent = int(part.get("exponent", "0"))
    if bottom == 0 or abs(exponent) > _MAX_EXPONENT:
        return None
    whole = Fraction(part.get("whole") or part.get("units", "0"))
    value = whole + top / bottom * Fraction(10) ** exponent
    return -value if part.get("sign") == "-" else value


def _unit(rest: str) -> str | None:
    """The unit that follows a number, in the singular and in full (``cm^2``: ``centimeter2``); None
    where the rest is no unit."""
    if _DEGREES.fullmatch(rest):
        return "degree"
    power = _POWER.search(rest)
    core = rest[: power.start()] if power else rest
    wrapped = _WRAPPER.fullmatch(core.strip())
    words = (wrapped[1] if wrapped else core).replace("\\%", "percent").casefold().split()
    words = [_PLURALS.get(word, word) for word in words]
    words = [word.rstrip("s") or word for word in words]
    words = [_PLURALS.get(word, word) for word in words]
    if not words or not (wrapped or all(word in _UNIT_WORDS for word in words)):
        return None
    words = [_LONG_UNITS.get(word, word) for word in words]
    exponent = power[1] if power else ""
    if len(words) > 1 and words[0] in _POWERS and not exponent:
        exponent, words = _POWERS[words[0]], words[1:]
    return " ".join(words) + exponent


def _same_item(left: str, right: str) -> bool:
    number, other = as_number(left), as_number(right)
    if number is not None and other is not None:
        units = {number[1], other[1]}
        return number[0] == other[0] and (len(units) == 1 or "" in units)
    return _spelling(left) == _spelling(right)


def _spelling(text: str) -> str:
    """The text without what does not change its meaning."""
    if choice := _CHOICE.fullmatch(text):
        text = choice[1]
    text = _WRAPPER.sub(r"\1", text)
    text = re.sub(r"\{(\w)\}", r"\1", text)
    # "2 5" is not 25: a blank stays where it keeps two numbers apart.
    text = re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"\s+", " ", text))
    text = re.sub(r"(?:\*|\\cdot|\\times)(?=[\\A-Za-z(])", "", text)
    return text.casefold() if text.isalpha() else text


def _same_list(left: str, right: str) -> bool:
    (brackets, items), (other_brackets, others) = _items(left), _items(right)
    if brackets != other_brackets or len(items) != len(others):
        return False
    if not 2 <= len(items) <= _MAX_ITEMS:
        return False
    if brackets in ("", "\\{\\}"):
        return _same_set(items, others)
    return all(starmap(_same_item, zip(items, others, strict=True)))


def _same_set(left: Sequence[str], right: Sequence[str]) -> bool:
    """True when every item on the left finds a partner of its own on the right."""
    free = list(right)
    for item in left:
        partner = next((other for other in free if _same_item(item, other)), None)
        if partner is None:
            return False
        free.remove(partner)
    return True


def _items(text: str) -> tuple[str, list[str]]:
    """The brackets and the items of a list: ``(1, 2)`` gives ``"()"`` and ``["1", "2"]``."""
    brackets = ""
    for start, end in (("\\{", "\\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        if text.startswith(start) and text.endswith(end):
            brackets, text = start + end, text[len(start) : len(text) - len(end)]
            break
    items, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append(text[begin:at].strip())
            begin = at + 1
    return brackets, [*items, text[begin:].strip()]
