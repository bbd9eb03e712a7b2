"""The environment protocol: observations, reward, ends, info and options."""

import pickle

import pytest

from megatron_spear.envs.alfworld.engine import admissible_actions
from megatron_spear.envs.alfworld.environment import AlfworldEnvironment
from megatron_spear.errors import DataError, EnvironmentFault


@pytest.fixture
def options(game_file):
    return {"game": game_file.to_fields()}


def test_reset_text_has_no_title(options):
    observation, info = AlfworldEnvironment().reset(seed=0, options=options)
    assert observation.startswith("You are in the middle of a room.")
    assert observation.endswith("\n\nYour task is to: put a clean mug in drawer.")
    assert info["won"] is False and info["valid"] is True and "admissible" not in info


def test_reward_comes_on_the_winning_turn_only(options, game_file):
    environment = AlfworldEnvironment()
    environment.reset(seed=0, options=options)
    results = [environment.step(f"  {action}\n") for action in game_file.walkthrough]
    assert [result.reward for result in results] == [0.0] * 5 + [1.0]
    assert [result.terminated for result in results] == [False] * 5 + [True]
    assert not any(result.truncated for result in results)
    assert results[-1].info["won"] is True
    assert results[-1].observation == "You move the mug 2 to the drawer 1."


def test_info_is_picklable_and_admissible_on_demand(options):
    environment = AlfworldEnvironment()
    _, info = environment.reset(seed=0, options={**options, "admissible": True})
    assert "go to fridge 1" in info["admissible"]
    result = pickle.loads(pickle.dumps(environment.step("go to fridge 1")))
    assert "open fridge 1" in result.info["admissible"]
    assert result.info["admissible"] == admissible_actions(environment._state)


def test_invalid_action_is_answered_and_marked(options):
    environment = AlfworldEnvironment()
    environment.reset(seed=0, options=options)
    result = environment.step("<think> \ud800 ")
    assert result.observation == "Nothing happens."
    assert result.info["valid"] is False and not result.terminated


def test_an_action_is_one_call(options):
    environment = AlfworldEnvironment()
    _, info = environment.reset(seed=0, options=options)
    assert "tool_calls" not in info
    for action, valid in ((" look\n", True), ("fly to the moon", False)):
        call = {"name": "act", "arguments": action.strip(), "succeeded": valid}
        assert environment.step(action).info["tool_calls"] == [call]


def test_anchor_tells_place_and_hand_apart(options):
    environment = AlfworldEnvironment()
    _, info = environment.reset(seed=0, options=options)
    assert info["anchor"].endswith("\n[at the middle of the room; holding nothing]")
    first = environment.step("go to drawer 1").info["anchor"]
    assert first.endswith("\n[at drawer 2, drawer 1; holding nothing]")
    environment.step("go to countertop 1")
    assert environment.step("go to drawer 1").info["anchor"] == first
    environment.step("take spoon 1 from drawer 1")
    assert environment.step("look").info["anchor"].endswith("holding spoon 1]")


def test_reset_starts_afresh(options, game_file):
    environment = AlfworldEnvironment()
    first = environment.reset(seed=0, options=options)
    for action in game_file.walkthrough:
        environment.step(action)
    assert environment.reset(seed=1, options=options) == first
    assert environment.step("go to countertop 1").observation.count("mug 2") == 1


def test_step_outside_a_game_is_a_fault(options, game_file):
    environment = AlfworldEnvironment()
    with pytest.raises(EnvironmentFault, match="call reset"):
        environment.step("look")
    environment.reset(seed=0, options=options)
    for action in game_file.walkthrough:
        environment.step(action)
    with pytest.raises(EnvironmentFault, match="call reset"):
        environment.step("look")
    environment.reset(seed=0, options=options)
    environment.close()
    with pytest.raises(EnvironmentFault, match="call reset"):
        environment.step("look")


@pytest.mark.parametrize("game", [None, "game.tw-pddl", {}, {"id": "x"}])
def test_wrong_game_is_an_error(game):
    with pytest.raises(DataError):
        AlfworldEnvironment().reset(seed=0, options={"game": game})


def test_unplayable_game_is_an_error(game_file):
    fields = {**game_file.to_fields(), "problem": "(define (problem x))"}
    with pytest.raises(DataError, match="no objects"):
        AlfworldEnvironment().reset(seed=0, options={"game": fields})
