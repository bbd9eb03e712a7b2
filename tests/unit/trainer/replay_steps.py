"""Trainer steps of hand-made groups for tests of the self-imitation hook."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.hand_made import (
    make_group,
)
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.types import (
    Coefficients,
    Reward,
    ScoredGroup,
    StepContext,
    StepReport,
    Update,
)

WIN = Reward(outcome=1.0, intrinsic=0.1)
LOSS = Reward(outcome=0.0, intrinsic=0.1)


def step_context(step: int, replay_weight: float = 0.5) -> StepContext:
    return StepContext(
        step=step,
        policy_version=step - 1,
        coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=replay_weight),
        seed=7,
    )


def step_groups(step: int, count: int = 3, **changes: Any) -> tuple[ScoredGroup, ...]:
    """Groups of one win and three losses, made with the step's weights."""
    return tuple(
        make_group(f"{step}-{i}", [LOSS, WIN, LOSS, LOSS], policy_version=step - 1, **changes)
        for i in range(count)
    )


def lone_group(step: int, *rewards: Reward | float) -> tuple[ScoredGroup, ...]:
    """One group of that step with these rewards."""
    return (make_group(f"{step}-x", rewards, policy_version=step - 1),)


def run_step(
    hook: Hook,
    step: int,
    groups: tuple[ScoredGroup, ...] | None = None,
    replay_weight: float = 0.5,
    algorithm: AlgorithmSection | None = None,
) -> tuple[list[Update], dict[str, float]]:
    ctx = step_context(step, replay_weight)
    groups = hook.on_scored(ctx, step_groups(step) if groups is None else groups)
    weight = ctx.coefficients.intrinsic_weight
    samples = make_samples(groups, turn_advantages(groups, algorithm or AlgorithmSection(), weight))
    final = [replace(s, old_logprobs=s.old_logprobs - np.float32(step)) for s in samples]
    hook.on_samples(ctx, final)
    updates = hook.extra_updates(ctx)
    metrics = hook.metrics()
    report = StepReport(step=step, policy_version=step, metrics=metrics)
    hook.on_step_end(ctx, report)
    return updates, metrics


def replayed_rows(updates: list[Update]) -> list[str]:
    return [str(sample.trajectory_id) for update in updates for sample in update.samples]


def stored_rows(hook: SelfImitationHook, folder: Path) -> list[str]:
    """The rows a resumed run would find."""
    store = ReplayStore(folder, None)
    store.load_state_dict(hook.state_dict()["store"])
    return [str(rows[0].trajectory_id) for rows in store.take(store.index().row_ids)]


def make_hook(folder: Path, **changes: Any) -> SelfImitationHook:
    values = {"capacity": 50, "max_age": 5, "rows_per_step": 8, "baseline_history": 20}
    return SelfImitationHook(ReplaySection(**(values | changes)), folder)
