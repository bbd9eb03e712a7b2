"""Endless small ALFWorld games, in the problem form of the official ones.

Game ``index`` of ``seed`` depends on nothing else, so it can be made anywhere and in any order.
Rooms and places follow `rooms`: apples lie in fridges and on counters, with some noise. Unlike in
many official games every receptacle has a location of its own.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.envs.alfworld.game import GameFile, parse_game
from megatron_spear.envs.alfworld.objective import (
    TREATMENTS,
    Objective,
    write_goal,
    write_sentence,
)
from megatron_spear.envs.alfworld.planner import plan
from megatron_spear.envs.alfworld.rooms import (
    BASINS,
    CAN_CONTAIN,
    LAMP,
    LAMP_PLACES,
    OPENABLE,
    PROPERTIES,
    ROOM_FIXTURES,
    ROOM_HABITS,
)
from megatron_spear.errors import ConfigError
from megatron_spear.types import TASK_TYPES

# Rooms of each task type; the weights are the official train split's.
_TASK_ROOMS = {
    "pick_and_place_simple": {"bathroom": 33, "bedroom": 30, "living": 27, "kitchen": 10},
    "look_at_obj_in_light": {"bedroom": 84, "living": 16},
    "pick_clean_then_place_in_recep": {"kitchen": 77, "bathroom": 23},
    "pick_heat_then_place_in_recep": {"kitchen": 1},
    "pick_cool_then_place_in_recep": {"kitchen": 1},
    "pick_two_obj_and_place": {"bathroom": 29, "bedroom": 29, "living": 27, "kitchen": 15},
}

_ODD_PLACE = 0.1  # chance that an object lies anywhere it fits instead of where it usually does
_EXTRA_TARGET = 0.3  # chance of one more object of the wanted type
_ONE_DONE = 0.1  # chance that one of two wanted objects is at its place from the start
_SPARE_LAMP = 0.3  # chance of a lamp nobody asks for

# Types that the domain's actions name must be declared in every problem.
_DOMAIN_OBJECT_TYPES = {"Knife", "ButterKnife", "Sink"}
_DOMAIN_RECEPTACLE_TYPES = {"SinkBasin", "Microwave", "Fridge"}


def generate_game(
    seed: int, index: int, *, task_types: Sequence[str], settings: GeneratorSection
) -> GameFile:
    """Game number ``index`` of ``seed``, solvable and not won at the start.

    Args:
        seed: which endless row of games.
        index: which game of it, from 0.
        task_types: some of `types.TASK_TYPES`; one is drawn, each with the same chance.
        settings: how many receptacles and movable objects a room has.

    Example: ``generate_game(0, 7, ..)`` may have the id
    ``pick_and_place_simple-Mug-None-Desk-gen0/trial_7`` and the task "put a mug in desk.".

    Raises:
        ConfigError: for an unknown task type or an empty list of them.
    """
    unknown = sorted(set(task_types) - set(TASK_TYPES))
    if unknown or not task_types:
        raise ConfigError(
            f"task_types has {unknown or 'nothing'}; expected some of {', '.join(TASK_TYPES)}"
        )
    rng = random.Random(f"alfworld/{seed}/{index}")
    scene = _draw_scene(rng, rng.choice(task_types), settings)
    objective = Objective(scene.task_type, scene.wanted.lower(), scene.target.lower())
    game = GameFile(
        id=f"{scene.task_type}-{scene.wanted}-None-{scene.target}-gen{seed}/trial_{index}",
        task=write_sentence(objective, rng.randrange(2)),
        walkthrough=[],
        solvable=True,
        problem=_write_problem(scene, objective, f"gen{seed}_{index}"),
    )
    return replace(game, walkthrough=plan(parse_game(game), objective))


@dataclass
class _Scene:
    """A room while it is drawn: ids by type, and which object lies in which receptacle."""

    task_type: str
    room: str
    wanted: str
    target: str
    rng: random.Random
    receptacles: list[tuple[str, str]] = field(default_factory=list)
    objects: list[tuple[str, str, str]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    def new_id(self, kind: str) -> str:
        """An id in AI2-THOR's form: type and a position no other id has."""
        while True:
            position = "_bar_".join(_number(self.rng.randrange(-399, 400)) for _ in range(3))
            name = f"{BASINS.get(kind, kind)}_bar_{position}"
            name += f"_bar_{kind}" if kind in BASINS else ""
            if name not in self.ids:
                self.ids.add(name)
                return name

    def put(self, kind: str, place: str) -> None:
        """One more object of a type, in the receptacle with the given id."""
        self.objects.append((self.new_id(kind), kind, place))


def _draw_scene(rng: random.Random, task_type: str, settings: GeneratorSection) -> _Scene:
    rooms = _TASK_ROOMS[task_type]
    room = rng.choices(list(rooms), list(rooms.values()))[0]
    wanted, target = _draw_wanted(rng, task_type, room)
    scene = _Scene(task_type, room, wanted, target, rng)
    size = rng.randint(settings.min_receptacles, settings.max_receptacles)
    for kind in _draw_receptacles(scene, size):
        scene.receptacles.append((scene.new_id(kind), kind))
    num_objects = rng.randint(settings.min_objects, settings.max_objects)
    num_objects -= _place_wanted(scene)
    stands = {name: LAMP_PLACES[kind] for name, kind in scene.receptacles if kind in LAMP_PLACES}
    if target == LAMP or (stands and rng.random() < _SPARE_LAMP):
        scene.put(LAMP, _draw(rng, stands)[0])
    _place_others(scene, num_objects)
    return scene


def _draw_wanted(rng: random.Random, task_type: str, room: str) -> tuple[str, str]:
    """An object type, and a receptacle type it can be put in and does not have to come from."""
    habits = ROOM_HABITS[room]
    treatment = TREATMENTS.get(task_type)
    able = PROPERTIES[treatment.property] if treatment is not None else habits.keys()
    kinds = [kind for kind in habits if kind in able and _targets(task_type, room, kind)]
    weights = [habits[kind].frequency for kind in kinds]
    wanted = rng.choices(kinds, weights)[0]
    return wanted, rng.choice(_targets(task_type, room, wanted))


def _targets(task_type: str, room: str, wanted: str) -> list[str]:
    if task_type == "look_at_obj_in_light":
        return [LAMP]
    treatment = TREATMENTS.get(task_type)
    homes = [kind for kind in ROOM_FIXTURES[room] if wanted in CAN_CONTAIN.get(kind, ())]
    if treatment is not None:
        return [kind for kind in homes if kind != treatment.appliance]
    return homes if len(homes) > 1 else []


def _draw_receptacles(scene: _Scene, size: int) -> list[str]:
    """Receptacle types: what every such room has, what the task needs, then at random."""
    rng, fixtures = scene.rng, ROOM_FIXTURES[scene.room]
    kinds = [kind for kind, fixture in fixtures.items() for _ in range(fixture.fewest)]
    if scene.target == LAMP:
        stands = {kind: share for kind, share in LAMP_PLACES.items() if kind in fixtures}
        kinds += _draw(rng, stands, but_not=kinds)
    elif scene.target not in kinds:
        kinds.append(scene.target)
    homes = ROOM_HABITS[scene.room][scene.wanted].places
    homes = {kind: share for kind, share in homes.items() if _may_start_in(scene, kind)}
    if not homes:
        fitting = (kind for kind in fixtures if scene.wanted in CAN_CONTAIN.get(kind, ()))
        homes = {kind: 1.0 for kind in fitting if _may_start_in(scene, kind)}
    kinds += _draw(rng, homes, but_not=kinds)
    counts = Counter(kinds)
    while len(kinds) < size:
        free = [kind for kind, fixture in fixtures.items() if counts[kind] < fixture.most]
        weights = [fixtures[kind].weight / (1 + 0.3 * counts[kind]) for kind in free]
        kind = rng.choices(free, weights)[0]
        counts[kind] += 1
        kinds.append(kind)
    return kinds


def _may_start_in(scene: _Scene, kind: str) -> bool:
    """Whether a wanted object may lie in a receptacle of this type without winning the game."""
    return kind != scene.target or scene.task_type in TREATMENTS


def _place_wanted(scene: _Scene) -> int:
    """Put the wanted objects into the room; gives how many."""
    rng = scene.rng
    two = scene.task_type == "pick_two_obj_and_place"
    count = (2 if two else 1) + (rng.random() < _EXTRA_TARGET)
    places = [(name, kind) for name, kind in scene.receptacles if _may_start_in(scene, kind)]
    for _ in range(count):
        scene.put(scene.wanted, _draw_place(scene, scene.wanted, places))
    if two and rng.random() < _ONE_DONE:
        targets = [name for name, kind in scene.receptacles if kind == scene.target]
        scene.put(scene.wanted, rng.choice(targets))
        count += 1
    return count


def _place_others(scene: _Scene, count: int) -> None:
    """``count`` objects of other types; a type that is there already is drawn less often."""
    usable = {place for _, place in scene.receptacles}
    weights = {
        kind: habit.frequency
        for kind, habit in ROOM_HABITS[scene.room].items()
        if kind != scene.wanted and any(kind in CAN_CONTAIN.get(place, ()) for place in usable)
    }
    for _ in range(count):
        kind = scene.rng.choices(list(weights), list(weights.values()))[0]
        weights[kind] *= 0.3
        scene.put(kind, _draw_place(scene, kind, scene.receptacles))


def _draw_place(scene: _Scene, kind: str, places: Iterable[tuple[str, str]]) -> str:
    """A receptacle for an object type: by habit, now and then (or without habits) any that fits."""
    fitting = [(name, place) for name, place in places if kind in CAN_CONTAIN.get(place, ())]
    shares = ROOM_HABITS[scene.room][kind].places
    weights = [shares.get(place, 0.0) for _, place in fitting]
    if scene.rng.random() < _ODD_PLACE or not any(weights):
        weights = [1.0] * len(fitting)
    return scene.rng.choices(fitting, weights)[0][0]


def _draw(
    rng: random.Random, weights: Mapping[str, float], but_not: Iterable[str] = ()
) -> list[str]:
    """One key drawn by weight, in a list; an empty list when it is among ``but_not``."""
    key = rng.choices(list(weights), list(weights.values()))[0]
    return [] if key in but_not else [key]


def _number(hundredths: int) -> str:
    sign = "minus" if hundredths < 0 else "plus"
    whole, part = divmod(abs(hundredths), 100)
    return f"_{sign}_{whole:02d}_dot_{part:02d}"


def _write_problem(scene: _Scene, objective: Objective, name: str) -> str:
    """The PDDL problem text, with the types and canContain facts of this room only."""
    locations = [
        f"loc_bar_{i % 9}_bar__minus_{i // 9 + 1}_bar_{scene.rng.randrange(4)}_bar_45"
        for i in range(len(scene.receptacles) + 1)
    ]
    kinds = sorted({kind for _, kind, _ in scene.objects})
    place_kinds = sorted({kind for _, kind in scene.receptacles})
    declared = ["agent1 - agent"]
    declared += [f"{kind}Type - otype" for kind in sorted({*kinds, *_DOMAIN_OBJECT_TYPES})]
    declared += [f"{k}Type - rtype" for k in sorted({*place_kinds, *_DOMAIN_RECEPTACLE_TYPES})]
    declared += sorted(f"{thing} - object" for thing, _, _ in scene.objects)
    declared += sorted(f"{place} - receptacle" for place, _ in scene.receptacles)
    declared += [f"{location} - location" for location in locations]
    facts = [f"receptacleType {place} {kind}Type" for place, kind in scene.receptacles]
    facts += [f"objectType {thing} {kind}Type" for thing, kind, _ in scene.objects]
    facts += [
        f"canContain {place}Type {kind}Type"
        for place in place_kinds
        for kind in kinds
        if kind in CAN_CONTAIN.get(place, ())
    ]
    facts += [f"pickupable {thing}" for thing, kind, _ in scene.objects if kind != LAMP]
    facts += [f"toggleable {thing}" for thing, kind, _ in scene.objects if kind == LAMP]
    facts += [f"openable {place}" for place, kind in scene.receptacles if kind in OPENABLE]
    for predicate, able in PROPERTIES.items():
        facts += [f"{predicate} {thing}" for thing, kind, _ in scene.objects if kind in able]
    facts.append(f"atLocation agent1 {locations[-1]}")
    facts += [f"inReceptacle {thing} {place}" for thing, _, place in scene.objects]
    where = {place: at for (place, _), at in zip(scene.receptacles, locations, strict=False)}
    facts += [f"receptacleAtLocation {place} {at}" for place, at in where.items()]
    facts += [f"objectAtLocation {thing} {where[place]}" for thing, _, place in scene.objects]
    return (
        f"(define (problem plan_{name})\n(:domain alfred)\n(:objects\n    "
        + "\n    ".join(declared)
        + "\n)\n(:init\n    "
        + "\n    ".join(f"({fact})" for fact in facts)
        + "\n)\n"
        + write_goal(objective, scene.wanted, scene.target)
        + "\n)\n"
    )
