"""Final answers in Minerva's normal form (arXiv 2206.14858, appendix D.1): tables and few rules."""

import re

# Replaced in this order, everywhere in the answer.
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_WORDS = r"""
square ways integers dollars mph inches hours km units \ldots sue points feet minutes digits
cents degrees cm gm pounds meters meals edges students childrentickets multiples
"""
# Removed in this order: units, layout, and what is left of both.
_REMOVED = (
    *_WORDS.split(),
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}"),
    *("\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
# A line's first formula between dollars, which stay until the end, and what wrappers hold: up to
# the first closing brace, or the last one of the line where it is a box.
_FORMULA = re.compile(r".*?\$(.*?)\$.*")
_WRAPPERS = tuple(
    re.compile(rf"\\{name}\{{({inside})\}}")
    for name, inside in (("text", ".*?"), ("textbf", ".*?"), ("overline", ".*?"), ("boxed", ".*"))
)
_FRACTION_SHORT = re.compile(r"frac([^{])(.)")
_ROOT_SHORT = re.compile(r"sqrt([^{])")


def minerva_normal_form(answer: str) -> str:
    """The answer without units, spaces, dollars and text wrappers; what follows its last ``=``.

    Examples: ``$42$ dollars`` gives ``42``, ``x = 1,000`` gives ``1000``, ``\\frac12`` gives
    ``\\frac{1}{2}``, ``\\text{42}`` gives ``42``.
    """
    answer = answer.split("=")[-1]
    for old, new in (*_REPLACED, *((word, "") for word in _REMOVED)):
        answer = answer.replace(old, new)
    answer = _FORMULA.sub(r"$\1$", answer)
    for wrapper in _WRAPPERS:
        answer = wrapper.sub(r"\1", answer)
    answer = _FRACTION_SHORT.sub(r"frac{\1}{\2}", answer)
    answer = _ROOT_SHORT.sub(r"sqrt{\1}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer.strip()
