"""Gymnasium for real: environments that are drawn as text, and one in text."""

import pytest

from megatron_spear.config.environments.adapters import GymnasiumSection
from megatron_spear.envs.adapters.gymnasium import GymnasiumEnvironment
from megatron_spear.envs.family import family_of
from megatron_spear.errors import ConfigError, EnvironmentFault
from megatron_spear.testing.environments import check_environment
from megatron_spear.testing.families import check_family

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (extra gymnasium)")

LAKE = {"render_mode": "ansi", "is_slippery": False}
MOVES = ("left", "down", "right", "up")
TO_THE_GOAL = ["down", "down", "right", "right", "down", "right"]


def _lake(actions=MOVES, **arguments):
    return GymnasiumEnvironment("FrozenLake-v1", {**LAKE, **arguments}, actions, 1.0)


def test_the_family_keeps_the_contract():
    section = GymnasiumSection(id="FrozenLake-v1", arguments=LAKE, actions=MOVES)
    check_family(section, actions=TO_THE_GOAL)


def test_a_walk_over_the_lake():
    environment = _lake()
    observation, info = environment.reset(seed=3, options={})
    assert observation.count("F") == 10 and info["won"] is False
    results = [environment.step(move) for move in TO_THE_GOAL]
    assert [result.reward for result in results] == [0.0] * 5 + [1.0]
    assert results[-1].terminated and results[-1].info["won"]
    with pytest.raises(EnvironmentFault, match="outside a task"):
        environment.step("down")


def test_what_is_no_action_changes_nothing():
    environment = _lake()
    before = environment.reset(seed=3, options={})[0]
    for text in ("jump", "7", "", "down left", "\ud800", "x" * 30_000):
        result = environment.step(text)
        assert not result.info["valid"] and not result.terminated, text
    assert "left, down, right, up" in environment.step("jump").observation
    assert environment.step(" LEFT ").observation.replace("(Left)", "").split() == before.split()


def test_numbers_are_names_where_none_are_given():
    environment = _lake(actions=())
    environment.reset(seed=0, options={})
    assert environment.step("1").info["valid"] and not environment.step("down").info["valid"]


def test_a_seed_of_the_options_decides():
    environment = _lake(is_slippery=True)
    moves = ["right", "down"] * 8

    def walk(seed, option):
        seen = [environment.reset(seed=seed, options={"seed": option})[0]]
        for move in moves:
            result = environment.step(move)
            seen.append(result.observation)
            if result.terminated:
                break
        return seen

    assert walk(1, 5) == walk(2, 5)
    assert len({tuple(walk(1, option)) for option in range(6)}) > 1


class Echo(gymnasium.Env):
    """Says what is said; "stop" ends it."""

    observation_space = gymnasium.spaces.Text(1000)
    action_space = gymnasium.spaces.Text(20)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(1000))
        return f"say {self.number}", {}

    def step(self, action):
        said = action == str(self.number)
        return f"you said {action}", float(said), said, action == "stop", {}


@pytest.fixture
def echo():
    gymnasium.register("SpearEcho-v0", entry_point=Echo)
    yield lambda: GymnasiumEnvironment("SpearEcho-v0", {"disable_env_checker": True}, (), 1.0)
    del gymnasium.registry["SpearEcho-v0"]


def test_text_spaces(echo):
    number = echo().reset(seed=0, options={"seed": 4})[0].removeprefix("say ")
    check_environment(echo, options={"seed": 4}, actions=["12", number], free_text=True)
    environment = echo()
    environment.reset(seed=0, options={"seed": 4})
    assert not environment.step("a sentence, which has signs outside the space").info["valid"]
    assert environment.step("stop").truncated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "NoLake-v1"}, "env.id=NoLake-v1: .*NoLake"),
        ({"id": "FrozenLake-v1"}, "no text; give env.arguments={render_mode: ansi}"),
        ({"id": "FrozenLake-v1", "arguments": {"colour": 1}}, "colour"),
        ({"id": "FrozenLake-v1", "arguments": LAKE, "actions": ("up",)}, "got 1 names, and"),
        ({"id": "Pendulum-v1"}, "its actions are Box"),
    ],
)
def test_what_is_no_text_environment_is_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        family_of(GymnasiumSection(**settings))
