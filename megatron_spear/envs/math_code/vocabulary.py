"""The closed word list of generated problems: what is asked, called, printed and answered."""

import re

from megatron_spear.envs.math_code.arithmetic import ARITHMETIC_KINDS, fresh_problem
from megatron_spear.envs.math_code.interpreter import NO_OUTPUT
from megatron_spear.envs.math_code.prompts import call_text

_CALL_START, _CALL_END = call_text("\n").split("\\n")

PHRASES = (
    "What is the remainder of",
    "What is the sum of all whole numbers from",
    "What is",
    "divided by",
    _CALL_START,
    _CALL_END,
    _CALL_END.replace("}}", "}"),
    "print(",
    "sum(range(",
    "\\boxed{",
    NO_OUTPUT,
    "NameError: name 'prin' is not defined",
    ". Did you mean: 'print'?",
    "SyntaxError: '(' was never closed",
    "error: not valid JSON (Expecting ',' delimiter at character",
)
"""Pieces of text that are one token each; decoding stays exact."""

_OTHER_WORDS = """
prin print sum range name code interpreter arguments tool call string Answer answer
error Error Syntax Name Type Value Zero Division invalid syntax not defined is was never closed
expected unexpected argument arguments Expecting delimiter value property enclosed in double quotes
at character valid JSON missing unknown must be of type only calls can be made one That neither a
nor an there no tool the program ended time out line Traceback most recent last File module
unmatched forget comma perhaps you unsupported operand for and int str list object callable
from import math while if else return def lambda true false None True False leading zeros in
decimal integer literals are permitted use an prefix octal integers EOF unterminated literal
detected positional function iterable subscriptable by zero modulo division or
"""


def math_words() -> tuple[str, ...]:
    """Every word, sorted, each once; digits and signs are tokens of their own."""
    words = set(_OTHER_WORDS.split())
    for phrase in PHRASES:
        words.update(re.findall("[A-Za-z]+", phrase))
    for kind in ARITHMETIC_KINDS:
        for index in range(20):  # every form of a sentence
            text = fresh_problem(0, index, [kind], 99, held_out=False).text
            words.update(re.findall("[A-Za-z]+", text))
    return tuple(sorted(words))
