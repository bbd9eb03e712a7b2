"""The engine against a slow reading of ALFWorld's own ``alfred.pddl``, over random play.

The reference tries every action of the domain file with every argument, as a planner would, so it
covers what the recorded transcripts do not: slicing, switches, objects in two places, closed doors.
"""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.game import Game, GameFile, GameState
from megatron_spear.envs.alfworld.pddl import parse_expression, parse_problem, parse_typed_list

ROOT = Path(__file__).parents[2]
DOMAIN = ROOT / ".." / "shared" / "data" / "alfworld" / "alfred.pddl"
SMALL_GAME = ROOT / "tests" / "unit" / "envs" / "alfworld" / "small_game.pddl"

# The arguments that a command names, in order, after its words.
COMMANDS = {
    "look": "look",
    "inventory": "inventory",
    "help": "help",
    "examinereceptacle": "examine {r}",
    "examineobject": "examine {o}",
    "gotolocation": "go to {r}",
    "openobject": "open {r}",
    "closeobject": "close {r}",
    "pickupobject": "take {o} from {r}",
    "putobject": "move {o} to {r}",
    "cleanobject": "clean {o} with {r}",
    "heatobject": "heat {o} with {r}",
    "coolobject": "cool {o} with {r}",
    "toggleobject": "use {o}",
    "sliceobject": "slice {co} with {ko}",
}


def objects_of(types, kind):
    return [name for name, own in types.items() if own == kind]


def holds(formula, facts, types, names):
    if not formula:
        return True
    head = formula[0]
    if head == "and":
        return all(holds(part, facts, types, names) for part in formula[1:])
    if head == "or":
        return any(holds(part, facts, types, names) for part in formula[1:])
    if head == "not":
        return not holds(formula[1], facts, types, names)
    if head == "exists":
        variables = parse_typed_list(formula[1], "domain")
        ranges = [objects_of(types, kind) for _, kind in variables]
        return any(
            holds(
                formula[2],
                facts,
                types,
                names | dict(zip([v for v, _ in variables], chosen, strict=True)),
            )
            for chosen in itertools.product(*ranges)
        )
    return (head, *(names.get(word, word) for word in formula[1:])) in facts


def changes(effect, facts, types, names):
    """The (added, removed) facts of an effect, costs and `checked` marks left out."""
    added, removed = set(), set()
    for part in effect[1:]:
        if part[0] == "when":
            if not holds(part[1], facts, types, names):
                continue
            part = part[2]
        target = part[1] if part[0] == "not" else part
        if target[0] in ("increase", "checked"):
            continue
        fact = (target[0], *(names.get(word, word) for word in target[1:]))
        (removed if part[0] == "not" else added).add(fact)
    return added, removed - added


def possible_actions(domain, facts, types, display):
    """Command -> facts after it, for every action the domain allows now."""
    here = next(fact[2] for fact in facts if fact[0] == "atlocation")
    found = {}
    for _, name, _, parameters, _, condition, _, effect in domain:
        variables = parse_typed_list(parameters, name)
        ranges = []
        for variable, kind in variables:
            # The agent is at one location: trying the others as "here" would only cost time.
            is_here = variable in ("?l", "?lstart")
            ranges.append([here] if is_here else objects_of(types, kind))
        for chosen in itertools.product(*ranges):
            names = dict(zip([variable for variable, _ in variables], chosen, strict=True))
            if not holds(condition, facts, types, names):
                continue
            added, removed = changes(effect, facts, types, names)
            if name == "gotolocation" and names["?lstart"] == names["?lend"]:
                continue  # the planner drops actions without effect
            labels = {variable[1:]: display.get(value, value) for variable, value in names.items()}
            found[COMMANDS[name].format(**labels)] = (facts - removed) | added
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_play_has_the_same_actions_and_effects(seed):
    if not DOMAIN.exists():
        pytest.skip(f"needs {DOMAIN}")
    parts = parse_expression(DOMAIN.read_text(encoding="utf-8"), "domain")
    domain = [part for part in parts if part[0] == ":action"]
    text = SMALL_GAME.read_text(encoding="utf-8")
    problem = parse_problem(text, "small")
    state = GameState(Game(GameFile("pick-1/t", "task", [], True, text)))
    facts = set(problem.init)
    chance = random.Random(seed)
    for _ in range(60):
        expected = possible_actions(domain, facts, problem.types, state.game.names)
        assert admissible_actions(state) == sorted(expected)
        stays = [command for command in expected if not command.startswith("go")]
        command = chance.choice(sorted(stays) + sorted(expected))
        assert act(state, command).valid
        facts = expected[command]
        assert state.facts | state.game.static_facts == facts, command
        assert state.won is holds(problem.goal, facts, problem.types, {})


def test_record_is_unchanged_by_play():
    text = SMALL_GAME.read_text(encoding="utf-8")
    record = GameFile("pick-1/t", "task", ["look"], True, text)
    before = dataclasses.asdict(record)
    state = GameState(Game(record))
    for command in admissible_actions(state):
        act(state, command)
    assert dataclasses.asdict(record) == before
