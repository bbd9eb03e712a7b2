"""Every environment of the package keeps to the contract, and the contract finds what breaks it."""

from pathlib import Path

import pytest

from megatron_spear.envs.alfworld.environment import AlfworldEnvironment
from megatron_spear.envs.alfworld.game import GameFile
from megatron_spear.envs.protocol import StepResult
from megatron_spear.testing.environments import (
    ContractViolation,
    check_determinism,
    check_environment,
    check_reset_again,
    check_reset_and_step,
    check_weird_text,
)
from megatron_spear.testing.toy_environment import CorridorEnvironment


def test_corridor_keeps_the_contract():
    check_environment(CorridorEnvironment, options={"length": 5}, actions=["left", "right"] * 4)


def test_alfworld_keeps_the_contract():
    problem = Path(__file__).parents[1] / "unit" / "envs" / "alfworld" / "small_game.pddl"
    walkthrough = [
        "go to countertop 1",
        "take mug 2 from countertop 1",
        "go to sinkbasin 1",
        "clean mug 2 with sinkbasin 1",
        "go to drawer 1",
        "move mug 2 to drawer 1",
    ]
    game = GameFile(
        id="pick_clean_then_place_in_recep-Mug-None-Drawer-1/trial_T1",
        task="Your task is to: put a clean mug in drawer.",
        walkthrough=walkthrough,
        solvable=True,
        problem=problem.read_text(encoding="utf-8"),
    )
    options = {"game": game.to_fields(), "admissible": True}
    check_environment(AlfworldEnvironment, options=options, actions=["look", *walkthrough])


class _Raises(CorridorEnvironment):
    def step(self, action):
        return super().step(action if action.isascii() else action.encode("ascii"))


class _Unpicklable(CorridorEnvironment):
    def reset(self, *, seed, options):
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**info, "graph": lambda: None}


class _Forgetful(CorridorEnvironment):
    """Leaks the number of earlier games into the observation."""

    games = 0

    def reset(self, *, seed, options):
        self.games += 1
        observation, info = super().reset(seed=seed, options=options)
        return f"{observation} game {self.games}", info


class _Chancy(_Forgetful):
    """Leaks between environments as well."""

    def reset(self, *, seed, options):
        type(self).games += 1
        return CorridorEnvironment.reset(self, seed=type(self).games, options=options)


class _FourTuple(CorridorEnvironment):
    def step(self, action):
        return super().step(action)[1:]


class _WonGoesOn(CorridorEnvironment):
    def step(self, action):
        return super().step(action)._replace(terminated=False)


class _TakesAnything(CorridorEnvironment):
    def step(self, action):
        result: StepResult = super().step(action)
        return result._replace(info={**result.info, "valid": True})


class _HalfACall(CorridorEnvironment):
    def step(self, action):
        result = super().step(action)
        return result._replace(info={**result.info, "tool_calls": [{"name": "walk"}]})


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (check_weird_text, _Raises, "raised"),
        (check_weird_text, _TakesAnything, "valid"),
        (check_reset_and_step, _Unpicklable, "pickled"),
        (check_reset_and_step, _FourTuple, "observation"),
        (check_reset_and_step, _WonGoesOn, "terminated"),
        (check_reset_and_step, _HalfACall, "dicts of name, arguments, succeeded"),
        (check_reset_again, _Forgetful, "second reset"),
        (check_determinism, _Chancy, "equal seeds"),
    ],
)
def test_contract_finds_what_is_broken(check, broken, message):
    actions = {} if check is check_weird_text else {"actions": ["right"] * 40}
    with pytest.raises(ContractViolation, match=message):
        check(broken, options={"length": 40}, **actions)
