"""The planner: shortest plans on known games, clear words on impossible ones."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.game import Game, GameFile, GameState
from megatron_spear.envs.alfworld.generator import generate_game
from megatron_spear.envs.alfworld.objective import read_goal
from megatron_spear.envs.alfworld.planner import plan, walkthrough
from megatron_spear.envs.alfworld.sources import iter_games
from megatron_spear.errors import DataError
from megatron_spear.types import TASK_TYPES

OFFICIAL = Path(__file__).parents[4] / ".." / "shared" / "data" / "alfworld"


def play(game: Game, actions: list[str]) -> GameState:
    state = GameState(game)
    for action in actions:
        assert act(state, action).valid, (game.id, action)
    return state


def shortest_by_search(game: Game, limit: int) -> int:
    """Slow reference: breadth-first search over every possible action."""
    frontier = [GameState(game)]
    seen = {frozenset(frontier[0].facts)}
    for depth in range(limit + 1):
        if any(state.won for state in frontier):
            return depth
        reached = []
        for state in frontier:
            for action in admissible_actions(state):
                if action.split()[0] in ("look", "inventory", "help", "examine", "close", "slice"):
                    continue
                twin = state.copy()
                act(twin, action)
                if frozenset(twin.facts) not in seen:
                    seen.add(frozenset(twin.facts))
                    reached.append(twin)
        frontier = reached
    raise AssertionError(f"no plan within {limit} actions")


def test_the_small_game_is_won(game_file: GameFile) -> None:
    game = Game(game_file)
    actions = walkthrough(game_file)
    assert play(game, actions).won
    assert len(actions) <= len(game_file.walkthrough)
    assert len(actions) == shortest_by_search(game, 7)


@pytest.mark.parametrize("task_type", ["pick_and_place_simple", "look_at_obj_in_light"])
def test_no_plan_is_shorter(task_type: str) -> None:
    sizes = GeneratorSection(max_receptacles=8, min_objects=4, max_objects=4)
    for index in range(4):
        game_file = generate_game(1, index, task_types=(task_type,), settings=sizes)
        shortest = shortest_by_search(Game(game_file), len(game_file.walkthrough))
        assert len(game_file.walkthrough) == shortest


def test_official_walkthroughs_are_not_beaten_by_their_own_length() -> None:
    if not (OFFICIAL / "valid_seen.jsonl.xz").exists():
        pytest.skip(f"needs {OFFICIAL / 'valid_seen.jsonl.xz'}")
    found = set()
    for game_file in islice(iter_games(OFFICIAL, split="valid_seen"), 0, 140, 3):
        game = Game(game_file)
        actions = plan(game, read_goal(game_file.problem, game_file.id))
        assert play(game, actions).won
        assert len(actions) <= len(game_file.walkthrough)
        found.add(game_file.task_type)
    assert found == set(TASK_TYPES)


def test_a_won_game_needs_no_action(game_file: GameFile) -> None:
    game = Game(game_file)
    objective = read_goal(game_file.problem, game_file.id)
    game.initial_facts = frozenset(play(game, plan(game, objective)).facts)
    assert plan(game, objective) == []


@pytest.mark.parametrize(
    ("word", "by", "lack"),
    [
        ("SinkBasinType)", "CounterTopType)", "no sinkbasin"),
        ("(canContain DrawerType MugType)", "", "no drawer that takes a mug"),
        ("(cleanable ", "(heatable ", "0 of 1 mug to take"),
    ],
)
def test_an_impossible_game_is_named(game_file: GameFile, word: str, by: str, lack: str) -> None:
    assert word in game_file.problem
    broken = replace(game_file, problem=game_file.problem.replace(word, by))
    with pytest.raises(DataError, match=f"cannot be won: .*{lack}"):
        walkthrough(broken)
