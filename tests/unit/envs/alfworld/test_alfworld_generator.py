"""Generated games: solvable, reproducible, independent of each other, of the asked size."""

import re
from collections import Counter

import pytest

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.envs.alfworld.engine import act
from megatron_spear.envs.alfworld.game import Game, GameFile, GameState
from megatron_spear.envs.alfworld.generator import generate_game
from megatron_spear.envs.alfworld.objective import read_goal, read_sentence
from megatron_spear.envs.alfworld.rooms import CAN_CONTAIN, ROOM_FIXTURES, ROOM_HABITS
from megatron_spear.envs.alfworld.text import intro
from megatron_spear.errors import ConfigError
from megatron_spear.types import TASK_TYPES


def make(
    index: int, *, seed: int = 0, task_types: tuple[str, ...] = TASK_TYPES, **sizes: int
) -> GameFile:
    return generate_game(seed, index, task_types=task_types, settings=GeneratorSection(**sizes))


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_the_walkthrough_wins_a_game_that_is_not_won_at_the_start(task_type: str) -> None:
    for index in range(40):
        game_file = make(index, task_types=(task_type,))
        state = GameState(Game(game_file))
        assert not state.won
        for action in game_file.walkthrough:
            assert not state.won, "the walkthrough is longer than it need be"
            assert act(state, action).valid, (game_file.id, action)
        assert state.won
        assert game_file.task_type == task_type


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_sentence_and_goal_and_id_say_the_same(task_type: str) -> None:
    for index in range(20):
        game_file = make(index, task_types=(task_type,))
        objective = read_goal(game_file.problem, game_file.id)
        assert objective == read_sentence(game_file.task)
        _, wanted, _, target, _ = game_file.id.split("-")
        assert (objective.object, objective.receptacle) == (wanted.lower(), target.lower())


def test_both_wordings_are_used() -> None:
    tasks = {make(i, task_types=("pick_two_obj_and_place",)).task for i in range(20)}
    assert any("find two" in task for task in tasks)
    assert any("put two" in task for task in tasks)


def test_ids_follow_the_official_form_and_are_unique() -> None:
    ids = [make(index, seed=3).id for index in range(50)]
    assert len(set(ids)) == 50
    for index, name in enumerate(ids):
        assert re.fullmatch(rf"[a-z_]+-\w+-None-\w+-gen3/trial_{index}", name)


def test_a_game_depends_on_seed_and_index_alone() -> None:
    alone = make(17, seed=5)
    in_a_row = [make(index, seed=5) for index in (3, 17, 17, 2)]
    assert in_a_row[1] == in_a_row[2] == alone
    assert make(17, seed=6).problem != alone.problem
    assert make(18, seed=5).problem != alone.problem


@pytest.mark.parametrize("sizes", [(8, 8, 4, 4), (8, 12, 8, 14), (40, 40, 80, 80)])
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_sizes_are_as_asked(task_type: str, sizes: tuple[int, int, int, int]) -> None:
    fewest, most, fewest_objects, most_objects = sizes
    for index in range(5):
        game_file = make(
            index,
            task_types=(task_type,),
            min_receptacles=fewest,
            max_receptacles=most,
            min_objects=fewest_objects,
            max_objects=most_objects,
        )
        game = Game(game_file)
        assert fewest <= len(game.receptacles) == game_file.num_receptacles <= most
        assert fewest_objects <= len(game.pickupable) <= most_objects


def test_names_are_numbered_from_one_in_the_room_listing() -> None:
    for index in range(30):
        listing = intro(GameState(Game(make(index)))).partition("you see")[2]
        numbers: dict[str, list[int]] = {}
        for kind, number in re.findall(r"a ([a-z]+) (\d+)", listing):
            numbers.setdefault(kind, []).append(int(number))
        assert sum(map(len, numbers.values())) >= 8
        for found in numbers.values():
            assert found == list(range(len(found), 0, -1))


def test_basins_are_called_basins() -> None:
    game = Game(make(0, task_types=("pick_clean_then_place_in_recep",)))
    assert "sinkbasin 1" in game.id_of


def test_things_lie_where_they_fit_and_mostly_where_they_usually_are() -> None:
    homes: Counter[str] = Counter()
    for index in range(150):
        game = Game(make(index, task_types=("pick_cool_then_place_in_recep",)))
        for place, things in GameState(game).contents.items():
            for thing in things:
                kinds = game.types_of[thing]
                assert thing not in game.pickupable or kinds & game.accepted_types[place]
                if "appletype" in kinds:
                    homes.update(game.receptacle_types_of[place])
    assert homes["fridgetype"] + homes["countertoptype"] > 0.35 * homes.total()
    assert len(homes) >= 5, "some apples lie in odd places"


def test_now_and_then_there_are_more_wanted_objects_than_needed() -> None:
    counts: Counter[int] = Counter()
    for index in range(100):
        game = Game(make(index, task_types=("pick_heat_then_place_in_recep",)))
        wanted = read_sentence(game.task).object + "type"
        counts[sum(wanted in kinds for kinds in game.types_of.values())] += 1
    assert set(counts) == {1, 2}
    assert 15 <= counts[2] <= 45


@pytest.mark.parametrize("task_types", [(), ("pick_and_fly",)])
def test_unknown_task_types_are_refused(task_types: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="expected some of pick_and_place_simple"):
        make(0, task_types=task_types)


def test_the_tables_fit_together() -> None:
    for room, habits in ROOM_HABITS.items():
        assert sum(fixture.most for fixture in ROOM_FIXTURES[room].values()) >= 40
        for kind, habit in habits.items():
            for place in habit.places:
                assert place in ROOM_FIXTURES[room], (room, kind, place)
                assert kind in CAN_CONTAIN[place]
