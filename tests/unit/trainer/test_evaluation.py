"""Success on the panel: what failed counts nowhere, by task type, and the paired interval."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_spear.config.schema import EvaluationSection
from megatron_spear.envs.family import Panel
from megatron_spear.testing.hand_made import make_trajectory
from megatron_spear.trainer.evaluation import PanelResult, evaluate, paired_interval
from megatron_spear.types import Prompt, Status, Trajectory, TrajectoryGroup

IDS = ("look-Pen-1/t1", "pick-Mug-2/t2", "pick-Pan-3/t3", "pick-Cup-4/t4")
KINDS = ("look", "pick", "pick", "pick")
PANEL = Panel(
    tuple(
        Prompt(prompt_id=i, env="alfworld", kind=kind) for i, kind in zip(IDS, KINDS, strict=True)
    ),
    sha256="0",
)


class _Rollouter:
    """Answers with ready trajectories, one a prompt; keeps how it was called."""

    def __init__(self, played: list[Trajectory]) -> None:
        self._played = played
        self.calls: list[dict[str, Any]] = []

    def collect_sync(self, prompts: Any, **settings: Any) -> list[TrajectoryGroup]:
        self.calls.append({"prompts": prompts, **settings})
        return [
            TrajectoryGroup(
                group_id=prompt.prompt_id,
                prompt=prompt,
                members=() if played.status.failed else (played,),
                failures=(played,) if played.status.failed else (),
            )
            for prompt, played in zip(prompts, self._played, strict=True)
        ]


def test_a_failed_rollout_is_neither_won_nor_lost() -> None:
    # The third fails after it had won: an error never becomes a result.
    rollouter = _Rollouter(
        [
            make_trajectory("a", 0, won=True),
            make_trajectory("b", 0, won=False),
            make_trajectory("c", 0, won=True, status=Status.FAILED_TOOL),
            make_trajectory("d", 0, won=True),
        ]
    )
    seen: list[int] = []
    section = EvaluationSection(seed=9, temperature=0.7)
    result = evaluate(rollouter, PANEL, section=section, progress=seen.append)
    assert result.won == (1.0, 0.0, None, 1.0) and result.kinds == KINDS
    assert result.failed == 1 and result.success == 2 / 3 and result.num_games == 3
    (call,) = rollouter.calls
    assert call == {
        "prompts": PANEL.prompts,
        "group_size": 1,
        "seed": (9, 0),
        "temperature": 0.7,
        "top_p": 1.0,
        "progress": seen.append,
    }


def test_several_attempts_give_the_share_won() -> None:
    class Twice(_Rollouter):
        def collect_sync(self, prompts: Any, **settings: Any) -> list[TrajectoryGroup]:
            first, second, third, fourth = super().collect_sync(prompts, **settings)
            lost = make_trajectory("x", 1, won=False)
            broken = make_trajectory("y", 1, won=True, status=Status.FAILED_ENGINE)
            return [
                replace(first, members=(*first.members, lost)),
                replace(second, members=(*second.members, lost)),
                replace(third, failures=(*third.failures, broken)),
                replace(fourth, failures=(broken,)),
            ]

    failed = make_trajectory("c", 0, status=Status.FAILED_TOOL)
    won, lost = make_trajectory("a", 0, won=True), make_trajectory("b", 0, won=False)
    rollouter = Twice([won, lost, failed, won])
    result = evaluate(rollouter, PANEL, section=EvaluationSection(attempts=2, top_p=0.6))
    assert result.won == (0.5, 0.0, None, 1.0) and result.failed == 3
    assert result.metrics()["eval/success"] == 0.5 and result.by_kind() == {
        "look": 0.5,
        "pick": 0.5,
    }
    assert (rollouter.calls[0]["group_size"], rollouter.calls[0]["top_p"]) == (2, 0.6)


def test_metrics_by_hand() -> None:
    result = PanelResult(kinds=KINDS, won=(None, False, True, True), failed=1, wall_s=2.5)
    assert result.metrics() == {
        "eval/success": pytest.approx(2 / 3),
        "eval/failed": 1.0,
        "time/eval_s": 2.5,
        "eval/success_pick": pytest.approx(2 / 3),
    }


def test_prompts_of_no_kind_are_in_the_whole_only() -> None:
    result = PanelResult(kinds=("", "pick", ""), won=(True, False, True), failed=0, wall_s=1.0)
    assert result.by_kind() == {"pick": 0.0} and result.success == pytest.approx(2 / 3)


def test_paired_interval_by_hand() -> None:
    mean, low, high = paired_interval([False] * 4, [True, False, False, False])
    assert (mean, low, high) == pytest.approx((0.25, 0.25 - 0.49, 0.25 + 0.49))
    # One won and one lost: differences 1, -1, 0, 0 have std sqrt(2/3).
    mean, low, high = paired_interval([False, True, True, False], [True, False, True, False])
    assert mean == 0.0 and high == -low == pytest.approx(1.96 * (2 / 3) ** 0.5 / 2)
    assert paired_interval([True, False], [True, False]) == (0.0, 0.0, 0.0)


def test_pairs_with_a_failed_game_are_left_out() -> None:
    before, after = [False, None, True, False, False], [True, True, None, False, False]
    expected = paired_interval([False, False, False], [True, False, False])
    assert paired_interval(before, after) == expected and expected[0] == pytest.approx(1 / 3)
    assert paired_interval([None, True], [True, None]) == (None, -1.0, 1.0)


def test_one_game_tells_nothing_about_the_spread() -> None:
    assert paired_interval([False], [True]) == (1.0, -1.0, 1.0)
