"""Settings with which stored trajectories are too old before they can be replayed are refused."""

from pathlib import Path

import pytest

from megatron_spear.config.check import check_config
from megatron_spear.config.load import load_config
from megatron_spear.config.method import ReplaySection
from megatron_spear.testing.hand_made import make_group, make_sample
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.types import Coefficients, StepContext, StepReport

AHEAD = "rollout.schedule=deterministic"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["replay.max_age=0"], "max_lag=0, so nothing is replayed: a trajectory is of age 1"),
        (["rollout.max_lag=5", AHEAD], "so nothing is replayed: all are of age 6 before"),
        (["rollout.max_lag=3", "replay.max_age=2"], "the long ones, are too old before they can"),
    ],
)
def test_refused(overrides: list[str], words: str) -> None:
    (line,) = check_config(load_config(None, overrides), 1)
    assert words in line and "or replay.enabled=false" in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["replay.max_age=1"],
        ["rollout.max_lag=4", AHEAD],
        ["rollout.max_lag=4"],
        ["replay.max_age=0", "replay.enabled=false"],
    ],
)
def test_old_enough(overrides: list[str]) -> None:
    assert check_config(load_config(None, overrides), 1) == []


@pytest.mark.parametrize(("max_lag", "max_age"), [(0, 0), (0, 1), (2, 2), (2, 3)])
def test_what_is_refused_would_never_replay(tmp_path: Path, max_lag: int, max_age: int) -> None:
    """Trajectories of version s - 1 - max_lag, step by step."""
    hook = SelfImitationHook(ReplaySection(max_age=max_age), tmp_path)
    updates = []
    for step in range(9, 13):
        version = step - 1 - max_lag
        weights = Coefficients(intrinsic_weight=0.0, replay_weight=1.0)
        ctx = StepContext(step=step, policy_version=step - 1, coefficients=weights, seed=0)
        hook.on_scored(ctx, (make_group(f"{step}", [1.0, 0.0], policy_version=version),))
        hook.on_samples(ctx, [make_sample(f"{step}", 0, policy_version=version)])
        updates += hook.extra_updates(ctx)
        hook.on_step_end(ctx, StepReport(step=step, policy_version=step, metrics={}))
    overrides = [f"rollout.max_lag={max_lag}", AHEAD, f"replay.max_age={max_age}"]
    assert bool(updates) is not bool(check_config(load_config(None, overrides), 1))
