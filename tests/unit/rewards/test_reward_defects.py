"""Defects of the released code's rewards and schedules, and what happens here instead.

The numbers are those of docs/official-mode.md.
"""

from typing import Any

import pytest

from megatron_spear.config.load import load_config
from megatron_spear.config.method import RewardSection
from megatron_spear.config.schema import EvaluationSection
from megatron_spear.curriculum.coefficients import coefficients
from megatron_spear.curriculum.schedules import cosine_warmup
from megatron_spear.envs.family import Panel
from megatron_spear.errors import ConfigError
from megatron_spear.rewards.compose import trajectory_reward
from megatron_spear.rewards.graders import (
    extract_answer,
    grade,
    official_minerva,
    official_strict,
)
from megatron_spear.rewards.official_shaping import official_turn_rewards
from megatron_spear.rewards.row_filters import void_answer
from megatron_spear.rewards.tool_calls import official_tool_reward
from megatron_spear.testing.hand_made import make_prompt, make_trajectory, make_turn
from megatron_spear.trainer.evaluation import evaluate
from megatron_spear.types import Trajectory, TrajectoryGroup

TOLD_TO_THE_FILTER = "[INVALID]"
"""The answer by which the released void filter knows that there is none."""


def test_defect_07_a_strict_grade_never_says_that_there_is_no_answer() -> None:
    """Words without an answer and without a call: the released filter waits for a text that its
    grader with boxes does not give."""
    words = "Let me think about the sum."
    assert official_minerva(words, "42").answer == TOLD_TO_THE_FILTER
    assert official_strict(words, "42").answer != TOLD_TO_THE_FILTER
    assert extract_answer(words) is None
    assert void_answer(words, num_tool_calls=0)
    assert not void_answer(words, num_tool_calls=1), "it acts"
    assert not void_answer("so \\boxed{42}", num_tool_calls=0), "it answers"


def test_defect_08_a_warmup_that_is_not_passed_on_is_twice_as_long() -> None:
    """100 steps were meant, the default of 200 ran: half the weight where all of it was due.

    Here the name that nobody reads is refused, and the one that is read counts.
    """
    meant, default = 100, 200
    assert cosine_warmup(meant, default) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match=r"curriculum\.max_replay_loss_steps: no such key"):
        load_config(None, [f"curriculum.max_replay_loss_steps={meant}"])
    config = load_config(None, [f"curriculum.replay_warmup_steps={meant}"])
    assert coefficients(meant, config.curriculum).replay_weight == 1.0
    assert coefficients(meant // 2, config.curriculum).replay_weight == pytest.approx(0.5)


class _Rollouter:
    """Plays every prompt as the given trajectory."""

    def __init__(self, played: Trajectory) -> None:
        self._played = played

    def collect_sync(self, prompts: Any, **settings: Any) -> list[TrajectoryGroup]:
        return [
            TrajectoryGroup(group_id=p.prompt_id, prompt=p, members=(self._played,))
            for p in prompts
        ]


def test_defect_26_the_bonus_is_in_the_released_validation_reward() -> None:
    """The same lost game of 20 turns is worth 1 at the start of a run and 0 at its end; the
    evaluation here sees that it was lost, whatever it called and whatever mu is."""
    start, end = (official_turn_rewards([0.0], [20], mu).tolist() for mu in (1.0, 0.0))
    assert (start, end) == ([1.0], [0.0])
    panel = Panel((make_prompt("a"),), sha256="0")
    for turns in (20, 1):
        segments = [[make_turn(f"go to desk {i}") for i in range(turns)]]
        for won in (False, True):
            played = make_trajectory("a", 0, segments, won=won)
            assert trajectory_reward(played, RewardSection()).intrinsic > 0.0
            result = evaluate(_Rollouter(played), panel, section=EvaluationSection())
            assert result.metrics()["eval/success"] == result.success == float(won)


def test_defect_27_calls_are_counted_whatever_came_of_them() -> None:
    """Ten times the same call, then ten that fail: the released rewards pay 1 for either, the
    default once for the one and nothing for the other."""
    same = make_trajectory("g", 0, [[make_turn("look")] * 10])
    failed = make_trajectory("g", 1, [[make_turn(f"fly {i}", valid=False) for i in range(10)]])
    paid = RewardSection(intrinsic={"type": "distinct_calls", "per_call": 0.1, "max": 1.0})
    for trajectory, expected in ((same, 0.1), (failed, 0.0)):
        assert official_tool_reward(len(trajectory.turns), 0.0, "linear") == 1.0
        for kind in ("official_linear", "official_steps"):
            official = RewardSection(intrinsic={"type": kind})
            assert trajectory_reward(trajectory, official).intrinsic == pytest.approx(1.0)
        assert trajectory_reward(trajectory, paid).intrinsic == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("\\boxed{ 42 }", "42"),
        ("\\boxed{42}" + " and so it goes" * 50, "42"),
        ("\\boxed{\\dfrac{1}{2}}", "0.5"),
        ("Answer: 42", "42"),
    ],
)
def test_defect_29_a_right_answer_counts_as_wrong_for_how_it_is_written(
    text: str, truth: str
) -> None:
    assert official_strict(text, truth).score == -1.0
    assert grade(text, truth).score == 1.0
