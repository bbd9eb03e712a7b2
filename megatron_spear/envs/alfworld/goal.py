"""Goals compiled once per game, so that a check in play is a few set look-ups.

The quantified formula is grounded: every variable is replaced by the objects it can stand for,
facts that never change are decided at once, and only the facts that play can change remain. "Some
mug is in some desk" over 2 mugs and 3 desks becomes "any of these 6 facts is among the current
ones"; on the full object lists a naive check costs 20 ms, this one 1-5 us.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass

from megatron_spear.envs.alfworld.pddl import Atom, Expression, parse_typed_list, show_expression
from megatron_spear.envs.alfworld.rules import DYNAMIC_PREDICATES, STATIC_PREDICATES
from megatron_spear.errors import DataError

Check = Callable[[Set[Atom]], bool]
Bindings = dict[str, str]

MAX_GROUND_FORMULAS = 50_000

_ARITY = {"=": 2, **DYNAMIC_PREDICATES, **STATIC_PREDICATES}
_KNOWN_TYPES = frozenset({"agent", "location", "receptacle", "object", "rtype", "otype"})


def compile_goal(
    goal: Expression, types: Mapping[str, str], static_facts: Set[Atom], where: str
) -> Check:
    """A function from the current changing facts to "is the goal reached".

    Args:
        goal: formula of and, or, not, imply, exists, forall, ``=`` and atoms.
        types: the type of each object; the type ``object`` covers all of them, as in PDDL.
        static_facts: the facts that play cannot change.
        where: the game's name for error messages.

    Raises:
        DataError: for an unknown predicate, type, object or connective, or a formula too large to
        ground.
    """
    return _as_check(_Grounder(types, static_facts, where).ground(goal, {}))


@dataclass(frozen=True)
class _All:
    """True when all ``atoms`` are facts and every part holds."""

    atoms: frozenset[Atom]
    parts: tuple["_Formula", ...] = ()


@dataclass(frozen=True)
class _Any:
    parts: tuple["_Formula", ...]


@dataclass(frozen=True)
class _Not:
    part: "_Formula"


_Formula = _All | _Any | _Not
_TRUE = _All(frozenset())
_FALSE = _Any(())


def _all_of(formulas: Iterator[_Formula]) -> _Formula:
    atoms: set[Atom] = set()
    parts: list[_Formula] = []
    for formula in formulas:
        if formula == _FALSE:
            return _FALSE
        if isinstance(formula, _All):
            atoms |= formula.atoms
            parts.extend(formula.parts)
        else:
            parts.append(formula)
    if len(parts) == 1 and not atoms:
        return parts[0]
    return _All(frozenset(atoms), tuple(dict.fromkeys(parts)))


def _any_of(formulas: Iterator[_Formula]) -> _Formula:
    parts: dict[_Formula, None] = {}
    for formula in formulas:
        if formula == _TRUE:
            return _TRUE
        parts.update(dict.fromkeys(formula.parts if isinstance(formula, _Any) else [formula]))
    return next(iter(parts)) if len(parts) == 1 else _Any(tuple(parts))


def _not(formula: _Formula) -> _Formula:
    if formula == _TRUE:
        return _FALSE
    if formula == _FALSE:
        return _TRUE
    return formula.part if isinstance(formula, _Not) else _Not(formula)


def _as_check(formula: _Formula) -> Check:
    if isinstance(formula, _All):
        atoms = formula.atoms
        if not formula.parts:
            return atoms.issubset
        parts = tuple(map(_as_check, formula.parts))
        return lambda facts: atoms <= facts and all(part(facts) for part in parts)
    if isinstance(formula, _Any):
        options = tuple(map(_as_check, formula.parts))

        def holds_any(facts: Set[Atom]) -> bool:
            for option in options:  # noqa: SIM110  # a plain loop is twice as fast as any()
                if option(facts):
                    return True
            return False

        return holds_any
    inner = _as_check(formula.part)
    return lambda facts: not inner(facts)


class _Grounder:
    """Replaces variables by objects; static facts limit what a variable can stand for."""

    def __init__(self, types: Mapping[str, str], static_facts: Set[Atom], where: str):
        self._where = where
        self._types = types
        self._static = static_facts
        self._facts_of: dict[str, list[Atom]] = {}
        for fact in static_facts:
            self._facts_of.setdefault(fact[0], []).append(fact)
        self._objects_of: dict[str, list[str]] = {"object": sorted(types)}
        for name in sorted(types):
            if types[name] != "object":
                self._objects_of.setdefault(types[name], []).append(name)
        self._found: dict[tuple[tuple[str, str | None, str | None], ...], list[Bindings]] = {}
        self._num_ground = 0

    def ground(self, formula: Expression, bindings: Bindings) -> _Formula:
        """``formula`` with its free variables replaced by ``bindings``, simplified."""
        if isinstance(formula, str) or not formula or not isinstance(formula[0], str):
            raise self._error(
                formula, "expected (and ...), (exists (...) ...) or (predicate name ...)"
            )
        head, *parts = formula
        if head in ("exists", "forall"):
            return self._quantified(formula, bindings)
        if head == "and":
            return _all_of(self.ground(part, bindings) for part in parts)
        if head == "or":
            return _any_of(self.ground(part, bindings) for part in parts)
        if head == "not" and len(parts) == 1:
            return _not(self.ground(parts[0], bindings))
        if head == "imply" and len(parts) == 2:
            sides = (_not(self.ground(parts[0], bindings)), self.ground(parts[1], bindings))
            return _any_of(iter(sides))
        atom = self._atom(formula, bindings)
        if head == "=":
            return _TRUE if atom[1] == atom[2] else _FALSE
        if head in DYNAMIC_PREDICATES:
            return _All(frozenset([atom]))
        return _TRUE if atom in self._static else _FALSE

    def _quantified(self, formula: list[Expression], bindings: Bindings) -> _Formula:
        kinds, body = self._quantifier(formula)
        while formula[0] == "exists" and isinstance(body, list) and body[:1] == ["exists"]:
            inner_kinds, inner_body = self._quantifier(body)
            if kinds.keys() & inner_kinds.keys():
                break
            kinds, body = {**kinds, **inner_kinds}, inner_body
        outer = {name: value for name, value in bindings.items() if name not in kinds}
        atoms = self._static_atoms(body) if formula[0] == "exists" else []
        choices = self._choices(kinds, atoms, outer)
        grounded = (self.ground(body, self._counted(choice, formula)) for choice in choices)
        return _any_of(grounded) if formula[0] == "exists" else _all_of(grounded)

    def _quantifier(self, formula: list[Expression]) -> tuple[dict[str, str], Expression]:
        """The variables with their types, and the body."""
        if len(formula) != 3 or isinstance(formula[1], str):
            raise self._error(formula, "expected (exists|forall (?name - type ...) formula)")
        kinds = dict(parse_typed_list(formula[1], self._where))
        for kind in kinds.values():
            if kind not in self._objects_of and kind not in _KNOWN_TYPES:
                raise self._error(formula, f"no object has the type {kind!r}")
        return kinds, formula[2]

    def _static_atoms(self, body: Expression) -> list[list[str]]:
        """The atoms that must hold for ``body`` to hold and that play cannot change."""
        if isinstance(body, str) or not body:
            return []
        if body[0] == "and":
            return [atom for part in body[1:] for atom in self._static_atoms(part)]
        words = [word for word in body if isinstance(word, str)]
        is_static = body[0] in STATIC_PREDICATES and len(words) == len(body)
        return [words] if is_static else []

    def _choices(
        self, kinds: Mapping[str, str], atoms: list[list[str]], bindings: Bindings
    ) -> Iterator[Bindings]:
        """All bindings of the variables under which the static ``atoms`` hold: a join on facts."""
        free = {name: kind for name, kind in kinds.items() if name not in bindings}
        if not free:
            yield bindings
            return
        useful = [atom for atom in atoms if any(word in free for word in atom[1:])]
        if not useful:
            name = min(free, key=lambda word: len(self._objects_of.get(free[word], ())))
            for value in self._objects_of.get(free[name], ()):
                yield from self._choices(kinds, atoms, {**bindings, name: value})
            return
        matches = [(atom, self._matches(atom, free, bindings)) for atom in useful]
        atom, extensions = min(matches, key=lambda match: len(match[1]))
        rest = [other for other in atoms if other is not atom]
        for extension in extensions:
            yield from self._choices(kinds, rest, {**bindings, **extension})

    def _matches(
        self, atom: list[str], free: Mapping[str, str], bindings: Bindings
    ) -> list[Bindings]:
        """What the static facts let the free variables of ``atom`` be."""
        key = tuple((word, free.get(word), bindings.get(word)) for word in atom)
        found = self._found.get(key)
        if found is None:
            facts = self._facts_of.get(atom[0], ())
            extensions = (self._extension(atom, fact, free, bindings) for fact in facts)
            found = self._found[key] = [entry for entry in extensions if entry is not None]
        return found

    def _extension(
        self, atom: list[str], fact: Atom, free: Mapping[str, str], bindings: Bindings
    ) -> Bindings | None:
        if len(fact) != len(atom):
            return None
        extension: Bindings = {}
        for word, value in zip(atom[1:], fact[1:], strict=True):
            kind = free.get(word)
            if kind is None or word in extension:
                if extension.get(word, bindings.get(word, word)) != value:
                    return None
            elif kind not in ("object", self._types[value]):
                return None
            else:
                extension[word] = value
        return extension

    def _atom(self, formula: list[Expression], bindings: Bindings) -> Atom:
        head = str(formula[0])
        arity = _ARITY.get(head)
        if arity is None:
            raise self._error(formula, "expected a predicate of the ALFWorld domain")
        if len(formula) != arity + 1:
            raise self._error(formula, f"expected {arity} names after {head!r}")
        names = [bindings.get(word, word) if isinstance(word, str) else "" for word in formula[1:]]
        for name in names:
            if name not in self._types:
                raise self._error(
                    formula, f"{name!r} is no object of the game and no bound variable"
                )
        return (head, *names)

    def _counted(self, choice: Bindings, formula: Expression) -> Bindings:
        self._num_ground += 1
        if self._num_ground > MAX_GROUND_FORMULAS:
            raise self._error(formula, f"it has more than {MAX_GROUND_FORMULAS} ground formulas")
        return choice

    def _error(self, formula: Expression, expected: str) -> DataError:
        shown = show_expression(formula)[:200]
        return DataError(
            f"{self._where}: the goal has {shown}: {expected}. Correct or remove the game."
        )
