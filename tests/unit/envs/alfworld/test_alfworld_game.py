"""The game record, names and numbers, state copies and the cache."""

import dataclasses
import pickle

import pytest

from megatron_spear.envs.alfworld.engine import act
from megatron_spear.envs.alfworld.game import Game, GameCache, GameFile, GameState, parse_game
from megatron_spear.errors import DataError


def test_record_survives_fields_and_pickle(game_file):
    fields = pickle.loads(pickle.dumps(game_file.to_fields()))
    assert GameFile.from_fields(fields, "x") == game_file
    assert fields == dataclasses.asdict(game_file)
    assert game_file.task_type == "pick_clean_then_place_in_recep"
    assert game_file.num_receptacles == 6
    assert hash(game_file) == hash(GameFile.from_fields(fields, "x"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("problem", None, "'problem' is a NoneType"),
        ("walkthrough", "go to desk 1", "'walkthrough' is a str"),
        ("walkthrough", [1], "no text"),
        ("solvable", 1, "'solvable' is a int"),
    ],
)
def test_wrong_field_is_an_error(game_file, name, value, message):
    with pytest.raises(DataError, match=message):
        GameFile.from_fields({**game_file.to_fields(), name: value}, "row 3")


def test_missing_field_is_an_error(game_file):
    fields = game_file.to_fields()
    del fields["task"]
    with pytest.raises(DataError, match=r"row 3: the field 'task' is missing; expected id, task"):
        GameFile.from_fields(fields, "row 3")


def test_numbers_are_given_from_the_last(state):
    names = state.game.names
    assert names["mug_bar_1"] == "mug 2"
    assert names["mug_bar_2"] == "mug 1"
    assert names["sink_bar_1_bar_sinkbasin"] == "sinkbasin 1"
    assert "curtains" not in names, "an object without a fact has no name and takes no number"


def test_an_object_can_be_in_several_receptacles(state):
    assert "spoon_bar_1" in state.contents["countertop_bar_1"]
    assert "spoon_bar_1" in state.contents["drawer_bar_2"]


def test_copies_are_independent(state):
    act(state, "go to countertop 1")
    twin = state.copy()
    assert twin.facts == state.facts
    act(twin, "take mug 2 from countertop 1")
    assert twin.facts != state.facts
    assert (state.held, twin.held) == (None, "mug_bar_1")
    assert "mug_bar_1" in state.contents["countertop_bar_1"]
    assert not state.taken


def test_cache_returns_the_same_game_until_it_is_pushed_out(game_file):
    cache = GameCache(max_games=2)
    first = cache.get(game_file)
    assert cache.get(dataclasses.replace(game_file)) is first
    other = cache.get(dataclasses.replace(game_file, task="Your task is to: rest."))
    assert other is not first and other.task == "Your task is to: rest."
    cache.get(game_file)
    cache.get(dataclasses.replace(game_file, id="third"))
    assert cache.get(game_file) is first
    assert cache.get(dataclasses.replace(game_file, task=other.task)) is not other


def test_cache_keeps_no_broken_game(game_file):
    broken = dataclasses.replace(game_file, problem="(define")
    for _ in range(2):
        with pytest.raises(DataError, match="unbalanced"):
            parse_game(broken)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(atLocation agent1 loc_bar_0)", "", "0 atLocation facts"),
        (
            "(atLocation agent1 loc_bar_0)",
            "(atLocation agent1 loc_bar_0) (atLocation agent1 loc_bar_1)",
            "2 atLocation facts",
        ),
        ("(openable Drawer_bar_1)", "(lockable Drawer_bar_1)", "lockable"),
        ("(openable Drawer_bar_1)", "(openable Drawer_bar_1 loc_bar_1)", "with 1 names"),
        (
            "(openable Drawer_bar_1)",
            "(receptacleAtLocation Drawer_bar_1 loc_bar_1)",
            "at two locations",
        ),
        ("(isClean ?o)", "(isShiny ?o)", "isshiny"),
    ],
)
def test_impossible_problem_is_an_error_that_names_the_game(game_file, old, new, message):
    broken = dataclasses.replace(game_file, problem=game_file.problem.replace(old, new))
    with pytest.raises(DataError, match=message) as error:
        Game(broken)
    assert game_file.id in str(error.value)


def test_problem_without_receptacles_is_an_error(game_file):
    emptied = game_file.problem.replace("(receptacleAtLocation ", "(wasInReceptacle ")
    with pytest.raises(DataError, match="no receptacleAtLocation"):
        Game(dataclasses.replace(game_file, problem=emptied))


def test_agent_can_start_at_a_receptacle_with_a_full_hand(game_file):
    changed = game_file.problem.replace(
        "(atLocation agent1 loc_bar_0)",
        "(atLocation agent1 loc_bar_3) (holds agent1 Mug_bar_1) (holdsAny agent1)",
    )
    state = GameState(Game(dataclasses.replace(game_file, problem=changed)))
    assert act(state, "clean mug 2 with sinkbasin 1").valid
