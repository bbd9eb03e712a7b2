"""Defects 7, 20, 21 and 24 of the official row filters: there in official mode, gone by default."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.config.method import AlgorithmSection, ReplaySection, RewardSection
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.data.prompts import FreshPrompts, PromptCursor
from megatron_spear.rewards.graders import official_strict
from megatron_spear.rewards.row_filters import void_answer
from megatron_spear.testing.hand_made import make_group, make_prompt, make_trajectory, make_turn
from megatron_spear.trainer.controller import Controller
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.hooks.official_replay import OfficialReplayHook
from megatron_spear.trainer.mini_batches import MiniBatch, MiniBatches
from megatron_spear.trainer.official_mini_batches import OfficialMiniBatches
from megatron_spear.types import (
    Coefficients,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    Segment,
    StepContext,
    StepReport,
    TrainSample,
    Turn,
)

CTX = StepContext(
    step=1,
    policy_version=0,
    coefficients=Coefficients(intrinsic_weight=0.0, replay_weight=0.0),
    seed=7,
)
MATH: dict[str, Any] = {"compat": "official", "official": {"tree": "math"}}
AGENT: dict[str, Any] = {"compat": "official", "official": {"tree": "agent"}}
CLEAN = make_turn()
OVERLONG = make_turn(finish_reason="length")
METHODS = ("grpo", "rloo", "reinforce_pp_baseline", "gigpo")


def _group(members: Sequence[tuple[float, Turn]]) -> ScoredGroup:
    """One prompt's trajectories of one turn each, with their outcomes."""
    return ScoredGroup(
        group_id="g",
        prompt=make_prompt("g"),
        members=tuple(
            ScoredTrajectory(
                trajectory=make_trajectory("g", index, [[turn]]), reward=Reward(outcome=outcome)
            )
            for index, (outcome, turn) in enumerate(members)
        ),
    )


def _section(**algorithm: Any) -> AlgorithmSection:
    return AlgorithmSection(**{"keep_groups_fraction": 1.0, "norm_length": 10, **algorithm})


def _samples(
    group: ScoredGroup, hooks: Sequence[Hook] = (), **algorithm: Any
) -> tuple[list[TrainSample], dict[str, float]]:
    """The samples of a step of one group, with its metrics."""
    controller = Controller(
        cursor=PromptCursor(FreshPrompts(lambda i: make_prompt(str(i)))),
        rollouter=None,  # type: ignore[arg-type]  # nothing is rolled out
        hooks=HookCalls({str(index): hook for index, hook in enumerate(hooks)}),
        rollout=RolloutSection(group_size=len(group.members)),
        reward=RewardSection(),
        algorithm=_section(**algorithm),
    )
    return controller.samples(CTX, controller.hooks.on_scored(CTX, (group,)))


def _advantages(samples: Sequence[TrainSample]) -> list[float]:
    """Each sample's, that of its only turn."""
    return [float(sample.advantages[1]) for sample in samples]


def _mini_batch(samples: Sequence[TrainSample], kind: type[MiniBatches], **more: Any) -> MiniBatch:
    rules = kind(algorithm=_section(**more), replay=ReplaySection())
    (plan,) = rules.plan(CTX, samples, samples, ())
    return rules.finish(CTX, plan, [()], {})


def test_defect_07_the_official_void_filter_of_mathematics_never_fires() -> None:
    text = "I give up"
    # The official rule asks whether the scorer's answer is "[INVALID]"; it is None without a box.
    assert official_strict(text, "4")[1] is None
    void = make_turn(text=text, void=void_answer(text, 0))
    group = _group([(1.0, CLEAN), (-1.0, void)])
    official, metrics = _samples(group, **MATH)
    assert _advantages(official) == [1.0, -1.0] and official[1].response_mask.any()
    assert metrics["filter/void_rows"] == 0
    ours, metrics = _samples(group)
    assert _advantages(ours) == [0.0, 0.0] and not ours[1].response_mask.any()
    assert metrics["filter/void_rows"] == 1
    # In the agent tree it does fire.
    official, _ = _samples(group, **AGENT)
    assert _advantages(official) == [1.0, 0.0]


@pytest.mark.parametrize("advantage", METHODS)
def test_defect_20_an_overlong_failure_pushes_the_others_up(advantage: str) -> None:
    group = _group([(1.0, CLEAN), (0.0, CLEAN), (0.0, OVERLONG)])
    if advantage == "grpo":
        official, _ = _samples(group, **MATH)
        assert _advantages(official) == pytest.approx([2 / 3, -1 / 3, 0.0])
    ours, _ = _samples(group, advantage=advantage)
    alone = turn_advantages([make_group("g", [1.0, 0.0])], _section(advantage=advantage), 0.0)
    expected = [values[0] for values in alone.values()]
    assert _advantages(ours) == pytest.approx([*expected, 0.0]) and expected[0] > 0
    # The switch lets it count; it is trained on by nothing either way.
    counted, _ = _samples(group, advantage=advantage, row_filters={"in_group_statistics": True})
    marked = frozenset({(group.members[2].trajectory.id, 0)})
    section = _section(advantage=advantage, row_filters={"in_group_statistics": True})
    all_three = turn_advantages([group], section, 0.0, marked)
    values = [values[0] for values in all_three.values()]
    assert advantage == "reinforce_pp_baseline" or values[1] != expected[1]
    assert _advantages(counted) == pytest.approx([values[0], values[1], 0.0])
    assert not counted[2].response_mask.any()


def test_defect_20_a_group_of_equal_rewards_and_an_overlong_failure_teaches_nothing() -> None:
    group = _group([(1.0, CLEAN), (1.0, CLEAN), (0.0, OVERLONG)])
    assert _advantages(_samples(group, **MATH)[0]) == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert _advantages(_samples(group)[0]) == [0.0, 0.0, 0.0]


def test_defect_21_the_agent_actor_rebuilds_the_mask_of_filtered_rows() -> None:
    """They count in means over tokens, get entropy bonus and KL, and covariance looks at them."""
    unreadable = make_turn(text="\ufffd", num_tokens=6)
    group = _group([(1.0, CLEAN), (0.0, CLEAN), (1.0, CLEAN), (0.0, unreadable)])
    more = {
        "aggregation": "token-mean",
        "entropy_coef": 0.01,
        "loss": {"type": "kl_cov", "fraction": 1.0},
    }
    official, _ = _samples(group, **AGENT, **more)
    assert official[3].response_mask.sum() == 6 and not official[3].advantages.any()
    batch = _mini_batch(official, OfficialMiniBatches, **AGENT, **more)
    assert [row.sum() for row in batch.regularizer_weights] == pytest.approx([2 / 12] * 3 + [0.5])
    assert [int(row.sum()) for row in batch.kl_selected] == [2, 2, 2, 6]
    ours, _ = _samples(group, **more)
    batch = _mini_batch(ours, MiniBatches, **more)
    assert batch.samples == tuple(ours[:3]), "nothing moves the marked row"
    for weights in (batch.weights, batch.regularizer_weights):
        assert [row.sum() for row in weights] == pytest.approx([1 / 3] * 3)
    assert [int(row.sum()) for row in batch.kl_selected] == [2, 2, 2]
    # The math tree passes its mask on.
    assert not _samples(group, **MATH, **more)[0][3].response_mask.any()


@pytest.mark.parametrize("official", [MATH, AGENT], ids=["math", "agent"])
def test_marked_rows_enter_no_official_buffer(official: dict[str, Any], tmp_path: Path) -> None:
    good, long = CLEAN, OVERLONG
    group = _group([(1.0, good), (1.0, long), (0.0, good), (0.0, good)])
    samples, _ = _samples(group, **official)
    hook = OfficialReplayHook(ReplaySection(), _section(**official), 4, tmp_path)
    hook.on_samples(CTX, samples)
    hook.on_step_end(CTX, StepReport(step=1, policy_version=1, metrics={}))
    hook.extra_updates(CTX)
    assert hook.metrics()["replay/stored"] == 1


def test_defect_21_with_a_window_one_row_of_a_trajectory_may_be_marked() -> None:
    """Its other rows are trained on, and the trajectory counts in its group."""
    group = _group([(1.0, CLEAN), (0.0, CLEAN)])
    won, lost = group.members
    turns = (CLEAN, make_turn(text="", void=True))
    trajectory = replace(won.trajectory, segments=tuple(Segment(turns=(t,)) for t in turns))
    group = replace(group, members=(replace(won, trajectory=trajectory), lost))
    samples, metrics = _samples(group)
    assert _advantages(samples) == [0.5, 0.0, -0.5]
    assert [bool(s.response_mask.any()) for s in samples] == [True, False, True]
    assert metrics["filter/marked_fraction"] == pytest.approx(1 / 3)


def _windowed(*members: tuple[float, Sequence[Turn]]) -> ScoredGroup:
    """One prompt's trajectories with their outcomes, a row for each turn."""
    return ScoredGroup(
        group_id="g",
        prompt=make_prompt("g"),
        members=tuple(
            ScoredTrajectory(
                trajectory=make_trajectory("g", index, [[turn] for turn in turns]),
                reward=Reward(outcome=outcome),
            )
            for index, (outcome, turns) in enumerate(members)
        ),
    )


@pytest.mark.parametrize("in_statistics", [False, True])
def test_whitening_counts_the_tokens_that_are_trained(in_statistics: bool) -> None:
    """The long marked row of a failure would move the mean and spread of all others."""
    long = make_turn(num_tokens=200, text="\ufffd")
    group = _windowed((1.0, (CLEAN, CLEAN)), (0.0, (CLEAN, long)), (0.0, (CLEAN,)), (0.0, (long,)))
    filters = {"in_group_statistics": in_statistics}
    samples, metrics = _samples(group, advantage="reinforce_pp_baseline", row_filters=filters)
    assert metrics["filter/unreadable_rows"] == 2
    trained = np.concatenate([s.advantages[s.response_mask] for s in samples])
    assert len(trained) == 4 * 2
    assert trained.mean() == pytest.approx(0.0, abs=1e-6)
    assert trained.var(ddof=1) == pytest.approx(1.0, rel=1e-5)


def test_a_marked_turn_is_in_no_step_group() -> None:
    """Both began at the same state; of the second's turn there nothing is learned, so the first's
    has nothing to be better than. The switch lets it count."""
    garbled = make_turn(text="\ufffd")  # its anchor is that of CLEAN
    group = _windowed((1.0, (CLEAN,)), (0.0, (garbled, make_turn("go"))))
    more = {"advantage": "gigpo", "gigpo": {"discount": 0.5}}
    ours, _ = _samples(group, **more)
    assert _advantages(ours) == [0.5, 0.0, -0.5]
    counted, _ = _samples(group, row_filters={"in_group_statistics": True}, **more)
    assert _advantages(counted) == [0.5 + 0.5, 0.0, -0.5]


class _LateRewards(Hook):
    """Rewards that come from elsewhere, after scoring, and without anything beside them."""

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        return tuple(
            replace(
                group,
                members=tuple(
                    replace(member, reward=Reward(outcome=10 * member.reward.outcome))
                    for member in group.members
                ),
            )
            for group in groups
        )


def test_defect_24_filters_do_not_depend_on_who_gave_the_rewards() -> None:
    def official_marks(extras: Mapping[str, list[bool]] | None, rows: int) -> list[bool]:
        """The official filters read what the reward function left beside its rewards; asynchronous
        rewards leave nothing."""
        return list(extras["is_overlong"]) if extras else [False] * rows

    assert official_marks({"is_overlong": [False, False, True]}, 3)[2]
    assert not any(official_marks(None, 3))
    group = _group([(1.0, CLEAN), (0.0, CLEAN), (0.0, OVERLONG)])
    early, late = (_samples(group, hooks)[0] for hooks in ((), (_LateRewards(),)))
    assert _advantages(late) == [10 * value for value in _advantages(early)] == [5.0, -5.0, 0.0]
    for one, other in zip(early, late, strict=True):
        np.testing.assert_array_equal(one.response_mask, other.response_mask)
    assert not late[2].response_mask.any()
