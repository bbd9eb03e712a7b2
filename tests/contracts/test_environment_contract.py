"""Every environment of the package keeps to the contract, also in a worker process, here or behind
a server; and the contract finds what breaks it."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from megatron_spear.envs.alfworld.environment import AlfworldEnvironment
from megatron_spear.envs.alfworld.game import GameFile
from megatron_spear.envs.protocol import StepResult
from megatron_spear.envs.webshop.environment import WebshopEnvironment
from megatron_spear.envs.webshop.generator import generate_goal, generate_products
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.testing.environment_servers import environment_server
from megatron_spear.testing.environments import (
    ContractViolation,
    check_determinism,
    check_environment,
    check_reset_again,
    check_reset_and_step,
    check_weird_text,
)
from megatron_spear.testing.market_environment import MarketEnvironment
from megatron_spear.testing.toy_environment import CorridorEnvironment


def test_corridor_keeps_the_contract():
    check_environment(CorridorEnvironment, options={"length": 5}, actions=["left", "right"] * 4)


PRICE = '<tool_call>{"name": "price", "arguments": {"item": "fig"}}</tool_call>'
PURCHASE = [
    PRICE,
    f"<think>again, with a slip</think>{PRICE}<tool_call>price(fig)</tool_call>",
    '<tool_call>{"name": "multiply", "arguments": {"a": 4, "b": 43}}</tool_call>',
    "172",
]


def test_an_environment_with_tools_keeps_the_contract():
    options = {"item": "fig", "count": 4, "price": 43}
    check_environment(MarketEnvironment, options=options, actions=PURCHASE)
    environment = MarketEnvironment()
    environment.reset(seed=0, options=options)
    results = [environment.step(action) for action in PURCHASE]
    assert [r.observation.split("\n")[0] for r in results] == ["43", "43", "172", ""]
    assert [r.info["valid"] for r in results] == [True, False, True, True]
    assert results[-1].terminated and results[-1].info["won"] and results[-1].reward == 1.0


MARKET = "megatron_spear.testing.market_environment:MarketEnvironment"
CORRIDOR = "megatron_spear.testing.toy_environment:CorridorEnvironment"
ALFWORLD = "megatron_spear.envs.alfworld.environment:AlfworldEnvironment"
WEBSHOP = "megatron_spear.envs.webshop.environment:WebshopEnvironment"


class _InAWorker:
    """A slot of a pool as an environment."""

    def __init__(self, pool, runner):
        self._pool, self._run = pool, runner.run
        self._slot = self._run(pool.open())

    def reset(self, *, seed, options):
        return self._run(self._pool.reset(self._slot, seed=seed, options=options))

    def step(self, action):
        return self._run(self._pool.step(self._slot, action))

    def close(self):
        self._pool.close_slot(self._slot)


@pytest.fixture(params=["own", "remote"])
def workers_of(request, tmp_path):
    """Makes environments of a factory in worker processes."""
    with asyncio.Runner() as runner, contextlib.ExitStack() as servers:
        remote = None
        if request.param == "remote":
            remote = servers.enter_context(environment_server(tmp_path))
        pools = []

        def make(factory):
            pools.append(EnvironmentPool(factory, workers=1, deadline_s=20.0, remote=remote))
            return lambda: _InAWorker(pools[-1], runner)

        yield make
        for pool in pools:
            pool.close()


def test_corridor_keeps_the_contract_in_a_worker(workers_of):
    make = workers_of(CORRIDOR)
    check_environment(make, options={"length": 5}, actions=["left", "right"] * 4)


def test_an_environment_with_tools_keeps_the_contract_in_a_worker(workers_of):
    options = {"item": "fig", "count": 4, "price": 43}
    check_environment(workers_of(MARKET), options=options, actions=PURCHASE)


def test_alfworld_keeps_the_contract_in_a_worker(workers_of):
    options, actions = _small_game()
    check_environment(workers_of(ALFWORLD), options=options, actions=actions)


def test_alfworld_keeps_the_contract():
    options, actions = _small_game()
    check_environment(AlfworldEnvironment, options=options, actions=actions)


@pytest.mark.parametrize("observation", ["text", "text_rich"])
def test_webshop_keeps_the_contract(observation):
    options, actions = _small_purchase()
    check_environment(
        lambda: WebshopEnvironment(observation=observation), options=options, actions=actions
    )


def test_webshop_keeps_the_contract_in_a_worker(workers_of):
    options, actions = _small_purchase()
    check_environment(workers_of(WEBSHOP), options=options, actions=actions)


def _small_purchase():
    """Options and actions of a visit that is won."""
    goal = generate_goal(generate_products(0, 200), ["fashion"], 0, 0, held_out=False)
    actions = [
        "search[<r>]",
        "click[next >]",
        f"search[{goal.name}]",
        f"click[{goal.asin}]",
        "click[features]",
        "click[< prev]",
        "click[free money]",
        *(f"click[{option}]" for option in goal.options),
        "click[buy now]",
    ]
    return {"goal": goal.to_fields(), "admissible": True}, actions


def _small_game():
    """Options and actions of a game that is won."""
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
    return {"game": game.to_fields(), "admissible": True}, ["look", *walkthrough]


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


class _Echoes(CorridorEnvironment):
    def step(self, action):
        return super().step(action)._replace(observation=f"what is {action}?")


class _HalfACall(CorridorEnvironment):
    def step(self, action):
        result = super().step(action)
        return result._replace(info={**result.info, "tool_calls": [{"name": "walk"}]})


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (check_weird_text, _Raises, "raised"),
        (check_weird_text, _TakesAnything, "valid"),
        (check_weird_text, _Echoes, "lone surrogate"),
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
