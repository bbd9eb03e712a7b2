"""A planner with full knowledge: the walkthrough of a game, or a clear error when there is none."""

from collections.abc import Iterable, Iterator

from megatron_spear.envs.alfworld.engine import act
from megatron_spear.envs.alfworld.game import Game, GameFile, GameState, parse_game
from megatron_spear.envs.alfworld.objective import Objective, read_goal
from megatron_spear.errors import DataError


def walkthrough(game_file: GameFile) -> list[str]:
    """Actions that win the game; see `plan`. Raises `DataError` when the goal cannot be reached."""
    objective = read_goal(game_file.problem, f"game {game_file.id}")
    return plan(parse_game(game_file), objective)


def plan(game: Game, objective: Objective) -> list[str]:
    """Fewest actions that reach ``objective`` from the start, played through on the engine.

    Every choice of objects, appliance and receptacle is written out as a route and the shortest one
    that wins is returned. That is the true minimum when each object lies in one receptacle; the few
    official games whose objects overlap two receptacles could in principle have a shorter way.

    Raises:
        DataError: when no route wins (nothing to take, no appliance, no receptacle that takes it).
    """
    if GameState(game).won:
        return []
    best: list[str] | None = None
    for route in sorted(_routes(game, objective), key=len):
        if best is not None and len(route) > len(best):
            break
        played = _played(game, route)
        if played is not None and (best is None or len(played) < len(best)):
            best = played
    if best is None:
        raise DataError(_why_unsolvable(game, objective))
    return best


class Surroundings:
    """Where the things of one objective are at the start of a game: ids, sorted.

    ``objects`` are (object, receptacle) pairs that can be taken, ``targets`` receptacles to put
    them in, ``appliances`` places that treat them, ``lamps`` (lamp, receptacle) pairs.
    """

    def __init__(self, game: Game, objective: Objective):
        kind, place_kind = f"{objective.object}type", f"{objective.receptacle}type"
        contents = GameState(game).contents
        pairs = [(thing, place) for place in game.receptacles for thing in contents[place]]
        self.objects = [
            (thing, place)
            for thing, place in pairs
            if kind in game.types_of.get(thing, ()) and thing in game.pickupable
        ]
        self.lamps = [
            (thing, place)
            for thing, place in pairs
            if place_kind in game.types_of.get(thing, ()) and thing in game.toggleable
        ]
        self.targets = [
            place
            for place in receptacles_of_type(game, place_kind)
            if kind in game.accepted_types.get(place, ())
        ]
        treatment = objective.treatment
        appliance = treatment.appliance.lower() if treatment is not None else ""
        self.appliances = receptacles_of_type(game, f"{appliance}type")
        if treatment is not None:
            able = {
                "clean": game.cleanable,
                "heat": game.heatable,
                "cool": game.coolable,
            }[treatment.verb]
            self.objects = [pair for pair in self.objects if pair[0] in able]


def receptacles_of_type(game: Game, kind: str) -> list[str]:
    """Ids of the receptacles of a type (``"desktype"``), sorted."""
    return [p for p in game.receptacles if kind in game.receptacle_types_of.get(p, ())]


class _Route:
    """Actions written down while the agent's place and the doors are kept track of."""

    def __init__(self, game: Game):
        self.actions: list[str] = []
        self._game = game
        self._location = game.start
        self._opened: set[str] = {fact[1] for fact in game.initial_facts if fact[0] == "opened"}

    def visit(self, place: str) -> None:
        location = self._game.location_of[place]
        if location != self._location:
            self._location = location
            self.actions.append(f"go to {self._game.names[place]}")

    def reach_into(self, place: str) -> None:
        self.visit(place)
        if place in self._game.openable and place not in self._opened:
            self._opened.add(place)
            self.actions.append(f"open {self._game.names[place]}")

    def take(self, thing: str, place: str) -> None:
        self.reach_into(place)
        self.actions.append(f"take {self._game.names[thing]} from {self._game.names[place]}")

    def put(self, thing: str, place: str) -> None:
        self.reach_into(place)
        self.actions.append(f"move {self._game.names[thing]} to {self._game.names[place]}")

    def treat(self, verb: str, thing: str, place: str) -> None:
        self.visit(place)
        self.actions.append(f"{verb} {self._game.names[thing]} with {self._game.names[place]}")

    def use(self, thing: str, place: str) -> None:
        self.visit(place)
        self.actions.append(f"use {self._game.names[thing]}")


def _routes(game: Game, objective: Objective) -> Iterator[list[str]]:
    known = Surroundings(game, objective)
    if objective.task_type == "look_at_obj_in_light":
        return _light_routes(game, known)
    if objective.task_type == "pick_two_obj_and_place":
        return _two_routes(game, known)
    return _single_routes(game, objective, known)


def _light_routes(game: Game, known: Surroundings) -> Iterator[list[str]]:
    for thing, place in known.objects:
        for lamp, stand in known.lamps:
            route = _Route(game)
            route.take(thing, place)
            route.use(lamp, stand)
            yield route.actions


def _single_routes(game: Game, objective: Objective, known: Surroundings) -> Iterator[list[str]]:
    treatment = objective.treatment
    for thing, place in known.objects:
        done = treatment is None or (treatment.state.lower(), thing) in game.initial_facts
        for appliance in [None] if done else known.appliances:
            for target in known.targets:
                route = _Route(game)
                route.take(thing, place)
                if treatment is not None and appliance is not None:
                    route.treat(treatment.verb, thing, appliance)
                route.put(thing, target)
                yield route.actions


def _two_routes(game: Game, known: Surroundings) -> Iterator[list[str]]:
    for target in known.targets:
        inside = {thing for thing, place in known.objects if place == target}
        outside = [(thing, place) for thing, place in known.objects if thing not in inside]
        for first, first_place in outside:
            for second, second_place in [("", "")] if inside else outside:
                if second == first:
                    continue
                route = _Route(game)
                route.take(first, first_place)
                route.put(first, target)
                if second:
                    route.take(second, second_place)
                    route.put(second, target)
                yield route.actions


def _played(game: Game, actions: Iterable[str]) -> list[str] | None:
    """The actions up to the one that wins; None when one of them fails or none wins."""
    state = GameState(game)
    done: list[str] = []
    for action in actions:
        done.append(action)
        if not act(state, action).valid:
            return None
        if state.won:
            return done
    return None


def _why_unsolvable(game: Game, objective: Objective) -> str:
    known = Surroundings(game, objective)
    lacks = []
    needed = 2 if objective.task_type == "pick_two_obj_and_place" else 1
    num_objects = len({thing for thing, _ in known.objects})
    if num_objects < needed:
        lacks.append(f"{num_objects} of {needed} {objective.object} to take")
    if objective.task_type == "look_at_obj_in_light":
        if not known.lamps:
            lacks.append(f"no {objective.receptacle} to switch on")
    elif not known.targets:
        lacks.append(f"no {objective.receptacle} that takes a {objective.object}")
    if objective.treatment is not None and not known.appliances:
        lacks.append(f"no {objective.treatment.appliance.lower()}")
    return (
        f"game {game.id} cannot be won: {', '.join(lacks) or 'no way of play reaches the goal'}; "
        f"expected a game whose task ({objective.task_type}) is possible. Leave the game out."
    )
