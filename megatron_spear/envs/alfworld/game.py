"""One ALFWorld game: the record it is stored as, its parsed rules, and the state of play."""

import hashlib
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_spear.envs.alfworld.goal import compile_goal
from megatron_spear.envs.alfworld.pddl import Atom, parse_problem
from megatron_spear.envs.alfworld.rules import DYNAMIC_PREDICATES, STATIC_PREDICATES
from megatron_spear.errors import DataError

_PLACED_RECEPTACLE = re.compile(r"\(\s*receptacleAtLocation\s+([^?\s)]+)", re.IGNORECASE)
_ARITY = {**DYNAMIC_PREDICATES, **STATIC_PREDICATES}


@dataclass(frozen=True)
class GameFile:
    """A game as stored.

    Example: ``GameFile(id="pick_and_place_simple-Mug-None-Desk-308/trial_T2019..", task="Your task
    is to: put a mug in desk.", walkthrough=["go to shelf 1", ..], solvable=True, problem="(define
    ..")``.
    """

    id: str
    task: str
    walkthrough: list[str] = field(hash=False)
    solvable: bool
    problem: str = field(repr=False)

    @classmethod
    def from_fields(cls, values: Mapping[str, Any], where: str) -> "GameFile":
        """Check and convert a plain mapping with this record's fields; others are left out."""
        for entry in fields(cls):
            kind = (
                list if entry.name == "walkthrough" else bool if entry.name == "solvable" else str
            )
            if entry.name not in values:
                names = ", ".join(other.name for other in fields(cls))
                raise DataError(f"{where}: the field {entry.name!r} is missing; expected {names}.")
            got = values[entry.name]
            if not isinstance(got, kind) and not (kind is list and isinstance(got, tuple)):
                raise DataError(
                    f"{where}: the field {entry.name!r} is a {type(got).__name__}; expected a "
                    f"{kind.__name__}."
                )
        record = {entry.name: values[entry.name] for entry in fields(cls)}
        record["walkthrough"] = list(record["walkthrough"])
        if not all(isinstance(action, str) for action in record["walkthrough"]):
            raise DataError(f"{where}: the walkthrough holds something that is no text.")
        return cls(**record)

    def to_fields(self) -> dict[str, Any]:
        """The record as a plain dict of JSON values, for ``Prompt.metadata["game"]``."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @property
    def task_type(self) -> str:
        """The part of the id before the first ``-``: in the official games a `TaskType`."""
        return self.id.split("-", 1)[0]

    @property
    def num_receptacles(self) -> int:
        """How many receptacles the agent can go to."""
        return len(set(_PLACED_RECEPTACLE.findall(self.problem)))


class Game:
    """A parsed game: everything that play cannot change. Share it freely; never change it.

    Ids are lower-cased as in TextWorld, for example ``desk_bar__minus_01_dot_20``. Their sorted
    order is the order of every list the player reads, and decides the numbers in the names: the
    first of three desks is ``desk 3``.
    """

    def __init__(self, game_file: GameFile):
        where = f"game {game_file.id}"
        problem = parse_problem(game_file.problem, where)
        self.id = game_file.id
        self.task = game_file.task
        facts: dict[str, set[Atom]] = {predicate: set() for predicate in _ARITY}
        for atom in problem.init:
            if _ARITY.get(atom[0]) != len(atom) - 1:
                raise DataError(
                    f"{where}: (:init ...) has {atom}; expected a predicate of the ALFWorld domain "
                    f"with {_ARITY.get(atom[0], 'its')} names. Correct or remove the game."
                )
            facts[atom[0]].add(atom)
        self.static_facts = frozenset(a for name in STATIC_PREDICATES for a in facts[name])
        self.initial_facts = frozenset(a for name in DYNAMIC_PREDICATES for a in facts[name])
        self.goal_reached = compile_goal(problem.goal, problem.types, self.static_facts, where)
        used = {name for atoms in facts.values() for atom in atoms for name in atom[1:]}
        self.names = _display_names(used)
        self.id_of = {name: entity for entity, name in self.names.items()}
        self.agent, self.start = _only_agent(facts["atlocation"], where)
        self._place_receptacles(facts, where)
        self._sort_objects(facts)

    def _place_receptacles(self, facts: Mapping[str, set[Atom]], where: str) -> None:
        self.location_of: dict[str, str] = {}
        at: dict[str, list[str]] = {}
        for _, receptacle, location in sorted(facts["receptacleatlocation"]):
            if receptacle in self.location_of:
                raise DataError(f"{where}: {receptacle} is at two locations; expected one.")
            self.location_of[receptacle] = location
            at.setdefault(location, []).append(receptacle)
        if not self.location_of:
            raise DataError(
                f"{where}: no receptacleAtLocation fact; expected one or more receptacles."
            )
        self.receptacles_at = {location: tuple(found) for location, found in at.items()}
        self.receptacles = tuple(sorted(self.location_of))
        self.openable = _names(facts["openable"])

    def _sort_objects(self, facts: Mapping[str, set[Atom]]) -> None:
        self.pickupable = _names(facts["pickupable"])
        self.toggleable = _names(facts["toggleable"])
        self.sliceable = tuple(sorted(_names(facts["sliceable"])))
        self.cleanable = _names(facts["cleanable"])
        self.heatable = _names(facts["heatable"])
        self.coolable = _names(facts["coolable"])
        self.types_of = _grouped(facts["objecttype"])
        self.receptacle_types_of = _grouped(facts["receptacletype"])
        accepted = _grouped(facts["cancontain"])
        self.accepted_types = {
            receptacle: frozenset().union(*(accepted.get(kind, ()) for kind in kinds))
            for receptacle, kinds in self.receptacle_types_of.items()
        }
        inside: dict[str, list[str]] = {}
        for _, inner, outer in sorted(facts["inreceptacleobject"]):
            inside.setdefault(outer, []).append(inner)
        self.inside_object = {outer: tuple(inner) for outer, inner in inside.items()}


class GameState:
    """Where play stands; `copy` is cheap (microseconds), so a search can branch.

    ``facts`` holds every fact that play can change. ``contents``, ``location`` and ``held`` repeat
    parts of it in the form the engine reads often: sorted objects of each receptacle (an object can
    be in several), the agent's location, the object in hand. ``taken`` are the (object, receptacle)
    pairs that a take has denied and no move has restored; only ``look`` reads them (see
    `text.look`).
    """

    __slots__ = ("contents", "facts", "game", "held", "location", "taken")

    def __init__(self, game: Game):
        self.game = game
        self.facts: set[Atom] = set(game.initial_facts)
        self.location = game.start
        holding = [atom[2] for atom in sorted(self.facts) if atom[0] == "holds"]
        self.held: str | None = holding[0] if holding else None
        self.contents: dict[str, tuple[str, ...]] = dict.fromkeys(game.receptacles, ())
        for atom in sorted(self.facts):
            if atom[0] == "inreceptacle" and atom[2] in self.contents:
                self.contents[atom[2]] += (atom[1],)
        self.taken: set[tuple[str, str]] = set()

    def copy(self) -> "GameState":
        """An independent state of the same game."""
        twin: GameState = object.__new__(GameState)
        twin.game = self.game
        twin.facts = self.facts.copy()
        twin.location = self.location
        twin.held = self.held
        twin.contents = self.contents.copy()
        twin.taken = self.taken.copy()
        return twin

    @property
    def won(self) -> bool:
        """Whether the goal holds now."""
        return self.game.goal_reached(self.facts)

    def is_accessible(self, receptacle: str) -> bool:
        """Whether things can be taken from and put into the receptacle: open, or without a door."""
        return receptacle not in self.game.openable or ("opened", receptacle) in self.facts


class GameCache:
    """The last ``max_games`` parsed games, so that a group of attempts parses its game once."""

    def __init__(self, max_games: int = 256):
        self._max_games = max_games
        self._games: OrderedDict[tuple[str, bytes], Game] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, game_file: GameFile) -> Game:
        """The parsed game; raises `DataError` when it cannot be parsed."""
        content = f"{game_file.task}\0{game_file.problem}".encode(errors="surrogatepass")
        key = (game_file.id, hashlib.blake2b(content, digest_size=16).digest())
        with self._lock:
            game = self._games.get(key)
            if game is None:
                game = self._games[key] = Game(game_file)
            self._games.move_to_end(key)
            if len(self._games) > self._max_games:
                self._games.popitem(last=False)
        return game


_CACHE = GameCache()


def parse_game(game_file: GameFile) -> Game:
    """The parsed game, from the process's cache when it was asked for lately."""
    return _CACHE.get(game_file)


def _display_names(ids: set[str]) -> dict[str, str]:
    """Names as ALFWorld's demangler gives them without shuffling: the last number goes first."""
    kinds: dict[str, str] = {}
    for entity in sorted(ids):
        kind, separator, _ = entity.partition("_bar_")
        kinds[entity] = (kind + ("basin" if "basin" in entity else "")) if separator else ""
    remaining = Counter(kinds.values())
    names: dict[str, str] = {}
    for entity, kind in kinds.items():
        names[entity] = f"{kind} {remaining[kind]}" if kind else entity
        remaining[kind] -= 1
    return names


def _only_agent(positions: set[Atom], where: str) -> tuple[str, str]:
    if len(positions) != 1:
        raise DataError(
            f"{where}: {len(positions)} atLocation facts; expected one agent at one location."
        )
    _, agent, location = next(iter(positions))
    return agent, location


def _names(atoms: set[Atom]) -> frozenset[str]:
    return frozenset(atom[1] for atom in atoms)


def _grouped(atoms: set[Atom]) -> dict[str, frozenset[str]]:
    groups: dict[str, set[str]] = {}
    for _, key, value in atoms:
        groups.setdefault(key, set()).add(value)
    return {key: frozenset(values) for key, values in groups.items()}
