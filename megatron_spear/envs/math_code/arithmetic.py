"""Generated problems that need the interpreter: a sentence, the code for it, the answer.

Small enough for a tiny model to read and to put into code, with numbers too large for it to compute
itself. A problem's text alone says whether it is held out, so that a panel never overlaps what is
trained on, whatever the seeds.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from megatron_spear.config.environments.math_code import ArithmeticKind
from megatron_spear.errors import DataError

ARITHMETIC_KINDS: tuple[ArithmeticKind, ...] = get_args(ArithmeticKind)

HELD_OUT_ONE_IN = 8
_MAX_TRIES = 2000


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One problem.

    Example: ``Arithmetic("mixed", "What is 37 times 58 minus 12?", "37 * 58 - 12", 2134)``.
    """

    kind: ArithmeticKind
    text: str
    expression: str
    answer: int


def fresh_problem(
    seed: int, index: int, kinds: Sequence[ArithmeticKind], largest: int, *, held_out: bool
) -> Arithmetic:
    """Problem ``index`` of a seed: one of those to train on, or one that is ``held_out``.

    Numbers go from 2 to ``largest``. Depends on nothing but the arguments. Raises DataError where
    ``largest`` is so small that there is none.
    """
    rng = random.Random(f"arithmetic/{seed}/{index}/{largest}")
    for _ in range(_MAX_TRIES):
        problem = _MAKERS[rng.choice(kinds)](rng, largest)
        if is_held_out(problem.text) is held_out:
            return problem
    raise DataError(
        f"env.arithmetic.largest={largest} leaves no problem of the kinds {', '.join(kinds)} that "
        f"is {'held out' if held_out else 'to train on'}; raise it or name more kinds"
    )


def is_held_out(text: str) -> bool:
    """Whether a problem is for panels: one text in eight, by its hash."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def _number(rng: random.Random, largest: int) -> int:
    return rng.randint(2, largest)


def _sum(rng: random.Random, largest: int) -> Arithmetic:
    """``What is 47 plus 85 minus 23?``"""
    numbers = [_number(rng, largest) for _ in range(3)]
    signs = [rng.choice("+-") for _ in range(2)]
    return _chain("sum", numbers, signs)


def _product(rng: random.Random, largest: int) -> Arithmetic:
    """``What is 47 times 85?``"""
    return _chain("product", [_number(rng, largest) for _ in range(2)], ["*"])


def _mixed(rng: random.Random, largest: int) -> Arithmetic:
    """``What is 47 times 85 minus 23?``"""
    numbers = [_number(rng, largest) for _ in range(3)]
    return _chain("mixed", numbers, ["*", rng.choice("+-")])


_WORDS = {"+": "plus", "-": "minus", "*": "times"}


def _chain(kind: ArithmeticKind, numbers: Sequence[int], signs: Sequence[str]) -> Arithmetic:
    said, code = str(numbers[0]), str(numbers[0])
    for sign, number in zip(signs, numbers[1:], strict=True):
        said += f" {_WORDS[sign]} {number}"
        code += f" {sign} {number}"
    # Products come first in each chain, so values can be added up from left to right.
    value = numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        value = {"+": value + number, "-": value - number, "*": value * number}[sign]
    return Arithmetic(kind, f"What is {said}?", code, value)


def _remainder(rng: random.Random, largest: int) -> Arithmetic:
    """``What is the remainder of 4185 divided by 23?``"""
    top, bottom = rng.randint(largest, largest * largest), _number(rng, largest)
    text = f"What is the remainder of {top} divided by {bottom}?"
    return Arithmetic("remainder", text, f"{top} % {bottom}", top % bottom)


def _range(rng: random.Random, largest: int) -> Arithmetic:
    """``What is the sum of all whole numbers from 23 to 85?``"""
    low = rng.randint(1, largest)
    high = low + rng.randint(2, largest)
    text = f"What is the sum of all whole numbers from {low} to {high}?"
    code = f"sum(range({low}, {high} + 1))"
    return Arithmetic("range", text, code, (low + high) * (high - low + 1) // 2)


_MAKERS: dict[ArithmeticKind, Callable[[random.Random, int], Arithmetic]] = {
    "sum": _sum,
    "product": _product,
    "mixed": _mixed,
    "remainder": _remainder,
    "range": _range,
}
