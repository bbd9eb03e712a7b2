"""Read PDDL text: nested lists of lower-cased words, and the problem of one game."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from megatron_spear.errors import DataError

Expression: TypeAlias = "str | list[Expression]"
Atom: TypeAlias = tuple[str, ...]

MAX_DEPTH = 100  # ALFWorld's problems nest 7 deep

_COMMENT = re.compile(r";[^\n]*")
_TOKEN = re.compile(r"[()]|[^\s()]+")


@dataclass(frozen=True)
class Problem:
    """The objects, initial facts and goal of one game, lower-cased as TextWorld's planner does.

    Example: ``(inReceptacle Mug_bar_1 Desk_bar_2)`` in ``:init`` becomes the atom
    ``("inreceptacle", "mug_bar_1", "desk_bar_2")``. Numeric assignments ``(= (distance ..) 3)`` are
    left out, because only the planner's cost uses them.
    """

    types: dict[str, str]
    init: tuple[Atom, ...]
    goal: Expression


def parse_expression(text: str, where: str) -> Expression:
    """The single s-expression in ``text``; raises `DataError` unless the parentheses balance."""
    stack: list[list[Expression]] = [[]]
    for token in _TOKEN.findall(_COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
            if len(stack) > MAX_DEPTH:
                raise DataError(f"{where}: parentheses nest deeper than {MAX_DEPTH}; is this PDDL?")
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) > 1:
            closed = stack.pop()
            stack[-1].append(closed)
        else:
            raise DataError(
                f"{where}: unbalanced parentheses, a ')' closes nothing; expected one (define ...) "
                "expression. Fetch the file again."
            )
    if len(stack) > 1:
        raise DataError(
            f"{where}: unbalanced parentheses, {len(stack) - 1} '(' left open; expected one "
            "(define ...) expression. The text may be cut off: fetch the file again."
        )
    if len(stack[0]) != 1 or isinstance(stack[0][0], str):
        raise DataError(
            f"{where}: got {len(stack[0])} top-level items; expected one (define ...) expression."
        )
    return stack[0][0]


def parse_problem(text: str, where: str) -> Problem:
    """The problem in ``text``; raises `DataError` for a missing section or a malformed entry."""
    expression = parse_expression(text, where)
    sections: dict[str, Sequence[Expression]] = {}
    for part in expression:
        if isinstance(part, list) and part and isinstance(part[0], str):
            sections[part[0]] = part[1:]
    if not expression or expression[0] != "define" or "problem" not in sections:
        raise DataError(f"{where}: expected (define (problem ...) ...), got another expression.")
    for name in (":objects", ":init", ":goal"):
        if not sections.get(name):
            raise DataError(
                f"{where}: the problem has no {name[1:]}; expected a non-empty ({name} ...) "
                "section. Fetch the game again or remove it."
            )
    if len(sections[":goal"]) != 1:
        raise DataError(
            f"{where}: (:goal ...) holds {len(sections[':goal'])} formulas; expected 1."
        )
    types = dict(parse_typed_list(sections[":objects"], where))
    init = tuple(_init_atoms(sections[":init"], types, where))
    return Problem(types=types, init=init, goal=sections[":goal"][0])


def parse_typed_list(items: Iterable[Expression], where: str) -> list[tuple[str, str]]:
    """``a b - t c - u`` gives ``[(a, t), (b, t), (c, u)]``; untyped is an ``object``."""
    typed: list[tuple[str, str]] = []
    waiting: list[str] = []
    words = iter(items)
    for word in words:
        if not isinstance(word, str):
            raise DataError(f"{where}: a list stands among typed names; expected 'name - type'.")
        if word != "-":
            waiting.append(word)
            continue
        kind = next(words, None)
        if not isinstance(kind, str) or not waiting:
            raise DataError(f"{where}: '-' without a name before it or a type after it.")
        typed.extend((name, kind) for name in waiting)
        waiting.clear()
    typed.extend((name, "object") for name in waiting)
    return typed


def _init_atoms(items: Iterable[Expression], types: dict[str, str], where: str) -> Iterable[Atom]:
    for item in items:
        if isinstance(item, str) or not item:
            raise DataError(f"{where}: got {item!r} in (:init ...); expected (predicate name ...).")
        if item[0] == "=":
            continue
        atom = tuple(word for word in item if isinstance(word, str))
        unknown = [name for name in atom[1:] if name not in types]
        if unknown or len(atom) != len(item):
            raise DataError(
                f"{where}: (:init ...) has {show_expression(item)}; expected a predicate and names "
                "from (:objects ...). Declare the names or remove the fact."
            )
        yield atom


def show_expression(item: Expression) -> str:
    """One line of text for an expression, with single spaces."""
    return item if isinstance(item, str) else "(" + " ".join(map(show_expression, item)) + ")"
