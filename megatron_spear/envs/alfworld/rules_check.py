"""Check that a PDDL domain and a TextWorld grammar are the ones this engine implements."""

import hashlib
import json
import re
from functools import lru_cache
from typing import Any

from megatron_spear.envs.alfworld.pddl import parse_expression, show_expression
from megatron_spear.envs.alfworld.rules import (
    ACTIONS,
    DYNAMIC_PREDICATES,
    FEEDBACK,
    STATIC_PREDICATES,
)
from megatron_spear.errors import DataError

ADVICE = (
    "This engine implements the games of alfworld >= 0.4.0; fetch them with `alfworld-download`."
)

_ACTION = re.compile(
    r'^action\s+(\w+)\s*\{\s*template\s*::\s*"([^"]*)"\s*;'
    r'\s*feedback\s*::\s*"([^"]*)"\s*;(?:\s*grammar\s*::\s*"""(.*?)"""\s*;)?\s*\}',
    re.MULTILINE | re.DOTALL,
)
_GRAMMAR = re.compile(r'^grammar\s*::\s*"""(.*?)"""\s*;', re.MULTILINE | re.DOTALL)
_TASK_RULE = re.compile(r'"task"\s*:\s*\[\s*\{\s*"rhs"\s*:\s*("(?:[^"\\]|\\.)*")\s*\}\s*\]')


def check_domain(text: str, where: str) -> None:
    """Raise `DataError` unless ``text`` defines exactly the predicates and actions of `rules`."""
    difference = _domain_difference(text)
    if difference:
        raise DataError(f"{where}: {difference}. {ADVICE}")


def check_grammar(text: str, where: str) -> None:
    """Raise `DataError` unless every template and feedback rule of `rules` is equal in ``text``.

    The task rule differs from game to game and is not compared; rules the engine never uses may
    differ.
    """
    difference = _grammar_difference(_TASK_RULE.sub('"task": []', text))
    if difference:
        raise DataError(f"{where}: {difference}. {ADVICE}")


def task_from_grammar(text: str, where: str) -> str:
    """The task sentence in a game's grammar, for example ``Your task is to: put a mug in desk.``"""
    found = _TASK_RULE.search(text)
    if found is None:
        raise DataError(f'{where}: the grammar has no "task" rule with one "rhs". {ADVICE}')
    try:
        task = str(json.loads(found.group(1), strict=False)).strip()
    except ValueError as error:
        raise DataError(
            f'{where}: the "task" rule is not a JSON string ({error}). {ADVICE}'
        ) from None
    if not task or "UNKNOWN GOAL" in task or "@@" in task:
        raise DataError(
            f"{where}: the grammar's task is the placeholder {task!r}; expected a sentence such as "
            f"'Your task is to: put a mug in desk.'. {ADVICE}"
        )
    return task


@lru_cache(maxsize=4)  # every game of a download carries the same text: read it once
def _domain_difference(text: str) -> str:
    found: dict[str, Any] = {}
    try:
        parts = parse_expression(text, "the PDDL domain")
    except DataError as error:
        return str(error)
    for part in parts:
        if not isinstance(part, list) or len(part) < 2:
            continue
        if part[0] == ":action":
            digest = hashlib.blake2b(show_expression(part[2:]).encode(), digest_size=6)
            found[f"action {show_expression(part[1])}"] = digest.hexdigest()
        elif part[0] == ":predicates":
            for predicate in part[1:]:
                found[f"predicate {predicate[0]}"] = sum(word[0] == "?" for word in predicate[1:])
    predicates = {"checked": 1, **DYNAMIC_PREDICATES, **STATIC_PREDICATES}
    expected: dict[str, Any] = {f"predicate {name}": arity for name, arity in predicates.items()}
    expected.update((f"action {name.lower()}", rule.definition) for name, rule in ACTIONS.items())
    return _first_difference(found, expected)


@lru_cache(maxsize=4)
def _grammar_difference(text: str) -> str:
    expected: dict[str, Any] = {}
    for name, rule in ACTIONS.items():
        expected[f"template of {name}"] = rule.template
        expected[f"feedback of {name}"] = rule.feedback
    expected.update((f"rule {symbol}", rules) for symbol, rules in FEEDBACK.items())
    found: dict[str, Any] = {}
    blocks = _GRAMMAR.findall(text)
    for name, template, feedback, block in _ACTION.findall(text):
        found[f"template of {name}"] = template
        # TextWorld's grammar reader skips white space before the first word.
        found[f"feedback of {name}"] = feedback.lstrip()
        blocks.append(block or "{}")
    for block in blocks:
        try:
            symbols = json.loads(block, strict=False)
        except ValueError as error:
            return f"a grammar block is not JSON ({error})"
        for symbol, rules in symbols.items():
            found[f"rule {symbol}"] = tuple(
                (rule.get("condition", ""), rule["rhs"]) for rule in rules
            )
    return _first_difference({name: found.get(name) for name in expected}, expected)


def _first_difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            return f"{name} is {found.get(name)!r}; expected {expected.get(name)!r}"
    return ""
