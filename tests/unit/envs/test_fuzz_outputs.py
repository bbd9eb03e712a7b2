"""100,000 generated model outputs: the parser reads them all, slower parts every n-th of them, or
with FUZZ_ALL=1 all of them too (some ten minutes).

A target is made once and gets one text after the other; add yours to TARGETS. It asserts what must
hold; raising anything is the failure.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_spear.envs.alfworld.environment import AlfworldEnvironment
from megatron_spear.envs.alfworld.game import GameFile
from megatron_spear.envs.alfworld.prompts import alfworld_view
from megatron_spear.envs.math_code.bench import Bench
from megatron_spear.envs.math_code.environment import MathCodeEnvironment
from megatron_spear.envs.math_code.grading import Grader
from megatron_spear.envs.math_code.prompts import math_view
from megatron_spear.envs.protocol import StepResult, TextEnvironment
from megatron_spear.envs.sandbox.execution import Execution
from megatron_spear.envs.tools.parsing import MAX_CALLS, parse_answer
from megatron_spear.envs.tools.view import ToolView
from megatron_spear.envs.views import AgentView
from megatron_spear.envs.webshop.environment import WebshopEnvironment
from megatron_spear.envs.webshop.generator import generate_goal, generate_products
from megatron_spear.envs.webshop.prompts import webshop_view
from megatron_spear.rewards.graders import grade, official_minerva, official_strict
from megatron_spear.rewards.row_filters import unreadable
from megatron_spear.rewards.tool_calls import tool_reward
from megatron_spear.testing.hostile_texts import hostile_text
from megatron_spear.testing.market_environment import MarketEnvironment, MarketView
from megatron_spear.types import ToolCall

NUM_TEXTS = 100_000
TRUTHS = ("1/2", "42", "\\frac{3}{4}", "(1, 2)", "x^2 + 1", "$1,000$", "")


class Target(NamedTuple):
    """``make()`` gives what is called with each text; ``every`` = 10: with every tenth."""

    name: str
    every: int
    make: Callable[[], Callable[[str], Any]]


def _can_be_written(text: str) -> bool:
    return text == text.encode("utf-8", "replace").decode("utf-8")


def _parse(text: str) -> None:
    thought, calls, content = parse_answer(text)
    assert len(thought) + len(content) <= len(text) + len(calls)
    assert len(calls) <= MAX_CALLS + 1
    for call in calls:
        assert _can_be_written(call.name + call.text)
        assert call.error is None or (call.error and not call.arguments and len(call.error) < 200)
        assert call.error is not None or call.name


def _view(view: AgentView, text: str) -> None:
    action, valid = view.parse(text)
    assert isinstance(action, str) and type(valid) is bool and type(view.void(text)) is bool
    shown = view.window("first", [("first", action)], "now", {"replies": ["now"]}, 1)
    assert all(isinstance(message["content"], str) for message in shown)


def _tool_view(view: ToolView, text: str) -> None:
    _view(view, text)
    assert not (view.parse(text).valid and view.void(text)), "what is well formed is not void"


def _play(environment: TextEnvironment, options: dict[str, Any]) -> Callable[[str], None]:
    """Steps an environment, which starts again when its task has ended."""

    def start() -> None:
        environment.reset(seed=0, options=options)

    def step(text: str) -> None:
        result = environment.step(text)
        assert type(result) is StepResult and type(result.info["valid"]) is bool
        assert _can_be_written(result.observation) and len(result.observation) < 400_000
        for call in result.info["tool_calls"]:
            assert {name: type(value) for name, value in call.items()} == _CALL_TYPES
            tool_reward([ToolCall(**call)])
        assert len(result.info.get("replies", ())) in (0, len(result.info["tool_calls"]))
        if result.terminated:
            start()

    start()
    return step


_CALL_TYPES = {"name": str, "arguments": str, "succeeded": bool}


def _alfworld() -> Callable[[str], None]:
    problem = Path(__file__).parent / "alfworld" / "small_game.pddl"
    game = GameFile(
        id="pick_clean_then_place_in_recep-Mug-None-Drawer-1/trial_T1",
        task="Your task is to: put a clean mug in drawer.",
        walkthrough=[],
        solvable=True,
        problem=problem.read_text(encoding="utf-8"),
    )
    return _play(AlfworldEnvironment(), {"game": game.to_fields(), "admissible": True})


def _webshop() -> Callable[[str], None]:
    goal = generate_goal(generate_products(0, 200), ["fashion"], 0, 0, held_out=False)
    return _play(WebshopEnvironment(), {"goal": goal.to_fields(), "admissible": True})


def _grade(text: str) -> None:
    truth = TRUTHS[len(text) % len(TRUTHS)]
    assert grade(text, truth).score in (0.0, 1.0)
    assert official_strict(text, truth).score in (-1.0, 1.0)
    assert official_minerva(text, truth).score in (-1.0, 1.0)
    assert isinstance(unreadable(text), bool)


class _FixedOutput:
    """A sandbox that runs nothing."""

    def run(self, code: str) -> Execution:
        return Execution("7\n", "", "ok", 0.0) if len(code) % 2 else Execution("", "", "error", 0.0)

    def close(self) -> None:
        pass


def _math() -> Callable[[str], None]:
    environment = MathCodeEnvironment(
        sandbox={}, make_bench=lambda *_: Bench(_FixedOutput(), Grader("official_strict"))
    )
    return _play(environment, {"problem": "What is 3 / 4?", "answer": "\\frac{3}{4}"})


def _grade_by_value() -> Callable[[str], None]:
    grader = Grader("tolerant", limit_s=1.0)

    def grade_one(text: str) -> None:
        verdict = grader.grade(text, TRUTHS[len(text) % len(TRUTHS)])
        assert type(verdict.right) is bool and not (verdict.right and verdict.fault)

    return grade_one


TARGETS = [
    Target("tool call parser", 1, lambda: _parse),
    Target(
        "tool view", 5, lambda: functools.partial(_tool_view, ToolView(MarketEnvironment.tools))
    ),
    Target("market view", 10, lambda: functools.partial(_tool_view, MarketView())),
    Target("compact view", 5, lambda: functools.partial(_view, alfworld_view("compact"))),
    Target("official view", 5, lambda: functools.partial(_view, alfworld_view("official"))),
    Target("tool environment", 5, lambda: _play(MarketEnvironment(), {"item": "fig"})),
    Target("alfworld", 5, _alfworld),
    Target("webshop view", 5, lambda: functools.partial(_view, webshop_view("official"))),
    Target("webshop", 10, _webshop),
    Target("graders", 10, lambda: _grade),
    Target("math view", 5, lambda: functools.partial(_tool_view, math_view("official"))),
    Target("math environment", 5, _math),
    Target("answers by value", 10, _grade_by_value),
]


@pytest.mark.timeout(1200 if os.environ.get("FUZZ_ALL") else 300)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_text_crashes_or_hangs_it(target: Target) -> None:
    take, slowest = target.make(), (0.0, 0)
    every = 1 if os.environ.get("FUZZ_ALL") else target.every
    for number in range(TARGETS.index(target) % every, NUM_TEXTS, every):
        text = hostile_text(number)
        started = time.thread_time()
        try:
            take(text)
        except Exception as error:
            raise AssertionError(f"hostile_text({number}): {error!r}") from error
        seconds = time.thread_time() - started
        # One that takes longer has more than linear work in it.
        allowed = 0.3 + 3e-6 * len(text)
        slowest = max(slowest, (seconds / allowed, number))
    assert slowest[0] < 1.0, f"hostile_text({slowest[1]}) took too long"


def test_the_texts_are_many_and_the_same_everywhere() -> None:
    texts = [hostile_text(number) for number in range(5000)]
    assert len(set(texts)) > 4000 and max(map(len, texts)) > 1_000_000
    assert texts[:50] == [hostile_text(number) for number in range(50)]
    parsed = [parse_answer(text) for text in texts]
    good = sum(any(c.error is None for c in answer.calls) for answer in parsed)
    bad = sum(any(c.error is not None for c in answer.calls) for answer in parsed)
    assert good > 200 and bad > 500, "calls of both kinds"
    for wanted in ("\x00", "\ud800", "\u202e", "</think>", "\\boxed{"):
        assert any(wanted in text for text in texts)
