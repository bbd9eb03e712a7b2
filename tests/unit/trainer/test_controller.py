"""Rank 0's stages: collection, scoring, hooks, samples, log-probs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from step_world import group

from megatron_spear.config.method import AlgorithmSection, RewardSection
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.data.prompts import FreshPrompts, PromptCursor
from megatron_spear.rewards.compose import score
from megatron_spear.testing.hand_made import make_prompt, make_sample
from megatron_spear.trainer.controller import (
    Controller,
    with_gradient,
    with_old_logprobs,
)
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.types import (
    Coefficients,
    Origin,
    ScoredGroup,
    StepContext,
    TrajectoryGroup,
    Update,
)

CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
    seed=7,
)


class _Rollouter:
    """Answers with ready groups; keeps how it was called."""

    def __init__(self, groups: Sequence[TrajectoryGroup] = ()) -> None:
        self.groups = list(groups)
        self.calls: list[dict[str, Any]] = []

    def collect_sync(self, prompts: Any, **settings: Any) -> list[TrajectoryGroup]:
        self.calls.append({"prompts": prompts, **settings})
        return self.groups


class _Drop(Hook):
    """Goes on without the first group it sees, and adds a ready update."""

    def __init__(self, update: Update) -> None:
        self.seen: list[list[str]] = []
        self._update = update

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        self.seen.append([group.group_id for group in groups])
        return groups[1:]

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        return [self._update]


def _controller(
    *,
    rollouter: Any = None,
    hooks: Sequence[Hook] = (),
    **algorithm: Any,
) -> Controller:
    return Controller(
        cursor=PromptCursor(FreshPrompts(lambda i: make_prompt(str(i)))),
        rollouter=rollouter or _Rollouter(),
        hooks=HookCalls({str(index): hook for index, hook in enumerate(hooks)}),
        rollout=RolloutSection(prompts_per_step=2, group_size=3, temperature=0.9),
        reward=RewardSection(intrinsic={"type": "distinct_calls", "per_call": 0.2, "max": 1.0}),
        algorithm=AlgorithmSection(
            **({"norm_length": 10, "keep_groups_fraction": 1.0} | algorithm)
        ),
    )


def _scored(controller: Controller, *groups: TrajectoryGroup) -> tuple[ScoredGroup, ...]:
    return tuple(score(group, controller.reward) for group in groups)


def _replay(count: int, weight: float = 0.5) -> Update:
    samples = tuple(make_sample("old", i) for i in range(count))
    return Update(samples=samples, origin=Origin.REPLAY, weight=weight)


def test_collect_takes_the_next_prompts_and_keys_the_draws_by_seed_and_step() -> None:
    rollouter = _Rollouter([group("a", [True, False], failed=1)])
    controller = _controller(rollouter=rollouter)
    seen: list[int] = []
    collected = controller.collect(CTX, seen.append)
    groups, metrics = collected.groups, collected.metrics
    assert collected.positions == (0, 1)
    assert groups == _scored(controller, *rollouter.groups)
    assert metrics["rollout/success"] == 0.5 and metrics["rollout/failed"] == 1
    assert not {name for name in metrics if name.startswith("filter")}
    (call,) = rollouter.calls
    call.pop("progress")(5)
    assert seen == [5]
    assert call == {
        "prompts": [make_prompt("0"), make_prompt("1")],
        "group_size": 3,
        "seed": (7, 3),
        "temperature": 0.9,
        "all_may_fail": False,
    }
    assert controller.cursor.state_dict() == {"consumed": 2}


def test_failures_are_never_scored() -> None:
    controller = _controller(rollouter=_Rollouter([group("a", [True, False], failed=2)]))
    collected = controller.collect(CTX)
    groups, metrics = collected.groups, collected.metrics
    samples, _ = controller.samples(CTX, groups)
    assert [str(s.trajectory_id) for s in samples] == ["a/0", "a/1"]
    assert [s.advantages.tolist() for s in samples] == [[0, 0.5, 0.5], [0, -0.5, -0.5]]
    # Shaped: (1 + 0.5 * 0.2 + 0 + 0.5 * 0.2) / 2, the two failed wins left out.
    assert metrics["reward/mean"] == pytest.approx(0.6) and metrics["reward/outcome"] == 0.5


def test_a_step_in_which_everything_failed_has_no_samples() -> None:
    controller = _controller()
    samples, metrics = controller.samples(CTX, _scored(controller, group("a", [], failed=2)))
    assert samples == [] and metrics["filter/num_empty_groups"] == 1


def test_hooks_choose_among_the_scored_groups_in_turn_and_add_updates() -> None:
    update = _replay(1)
    hooks = [_Drop(update), _Drop(update)]
    won = {"a": [True, True], "b": [True, False], "c": [True, False]}
    rollouter = _Rollouter([group(g, w) for g, w in won.items()])
    controller = _controller(rollouter=rollouter, hooks=hooks)
    samples, metrics = controller.samples(CTX, controller.collect(CTX).groups)
    assert [hook.seen for hook in hooks] == [[["a", "b", "c"]], [["b", "c"]]]
    assert {s.trajectory_id.group for s in samples} == {"c"}
    assert metrics["filter/num_groups"] == 1
    assert controller.hooks.extra_updates(CTX) == [update, update]


def test_with_gradient_keeps_whole_trajectories() -> None:
    """In window mode a segment without advantage stays with the others of its trajectory."""
    samples = [
        make_sample("a", 0, segment=0, num_segments=2, advantage=0.0),
        make_sample("b", 0, advantage=0.0),
        make_sample("a", 0, segment=1, num_segments=2, advantage=-1.0),
        make_sample("b", 1, advantage=2.0),
    ]
    assert with_gradient(samples) == [samples[0], samples[2], samples[3]]
    assert with_gradient(samples[:2]) == []


def test_old_logprobs_are_0_outside_the_mask() -> None:
    sample = make_sample(mask=[0, 1, 0, 1])
    (made,) = with_old_logprobs([sample], [np.array([-9.0, -0.25, -9.0, -1.0])])
    assert made.old_logprobs.tolist() == [0, -0.25, 0, -1.0]
    assert made.old_logprobs.dtype == np.float32
    assert replace(made, old_logprobs=sample.old_logprobs) == sample
