"""Recalibrated advantages are divided where the new ones are, by the spread of what they are
compared with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_steps import run_step

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.group_baselines import STD_EPSILON
from megatron_spear.algorithms.official.advantages import recalibrated_advantage
from megatron_spear.config.load import load_config
from megatron_spear.config.method import AlgorithmSection, GigpoSection, ReplaySection
from megatron_spear.errors import CheckpointError
from megatron_spear.replay.baseline import BaselineHistory, batch_spread
from megatron_spear.replay.spread import divides_by_spread
from megatron_spear.rollout.token_texts import TokenTexts
from megatron_spear.testing.hand_made import make_group, make_trajectory, make_turn
from megatron_spear.trainer.build import make_hooks
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory

STD = AlgorithmSection(normalize_std=True)
SPREADS = ("fixed_variance", "covariance", "intrinsic_variance")


def _groups(step: int, *plays: list[float]) -> tuple[ScoredGroup, ...]:
    return tuple(
        make_group(f"{step}-{i}", rewards, policy_version=step - 1)
        for i, rewards in enumerate(plays)
    )


def _replayed(hook: Hook, *plays: list[float], steps: int = 2, **changes: Any) -> list[float]:
    """The advantages of the rows replayed in the last of some steps of these groups."""
    updates = []
    for step in range(1, 1 + steps):
        updates, _ = run_step(hook, step, _groups(step, *plays), **({"algorithm": STD} | changes))
    return [float(s.advantages.max()) for update in updates for s in update.samples]


def _hook(folder: Path, **changes: Any) -> SelfImitationHook:
    values = {"capacity": 50, "rows_per_step": 50, "baseline_history": 80} | changes
    return SelfImitationHook(ReplaySection(**values), folder, divide=True)


def _official(reward: float, groups: list[list[float]]) -> float:
    means = np.array([np.mean(group) for group in groups])
    stds = np.array([np.std(group, ddof=1) for group in groups])
    one = np.ones((1, 1))
    result = recalibrated_advantage(reward * one, one, means, stds, normalize_std=True)
    return float(result.advantages[0, 0])


def test_a_replayed_win_is_worth_what_the_official_code_makes_of_it(tmp_path: Path) -> None:
    """Success 10, two of eight won: (10 - 2.5) / 4.629, as a new win, not 7.5."""
    group = [0.0] * 6 + [10.0] * 2
    found = _replayed(_hook(tmp_path), *[group] * 4)
    assert found == pytest.approx([_official(10.0, [group] * 4)] * 8, rel=1e-6)
    (new,) = _groups(1, group)
    win = max(values.max() for values in turn_advantages([new], STD, 0.0).values())
    assert found == pytest.approx([win] * 8, rel=1e-6) and win == pytest.approx(1.62, abs=0.01)


def test_defect_30_with_many_equal_groups_the_official_scale_is_gone(tmp_path: Path) -> None:
    """Three of five groups all lost: the median spread is 0 there, and a win's advantage 10^7. A
    group of equal rewards divides no new advantage, and none of ours."""
    plays = [[0.0] * 4] * 3 + [[10.0, 0.0, 0.0, 0.0]] * 2
    assert _official(10.0, plays) == pytest.approx(1e7)
    assert _replayed(_hook(tmp_path), *plays) == pytest.approx([10.0 / 5.0] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        # means 2.5 and 5, stds 5 and 5.77
        ("p50", [(10 - 3.75) / 5.3868] * 3),
        ("per_prompt", [7.5 / 5.0, 5 / 5.7735, 5 / 5.7735]),
        # all eight of the step: mean 3.75, std 5.1755
        ("batch_mean", [6.25 / 5.1755] * 3),
    ],
)
def test_each_baseline_has_its_spread(tmp_path: Path, baseline: str, expected: list[float]) -> None:
    plays = ([10.0, 0.0, 0.0, 0.0], [10.0, 10.0, 0.0, 0.0])
    hook = _hook(tmp_path, baseline=baseline)
    assert _replayed(hook, *plays) == pytest.approx(expected, rel=1e-4)


def test_a_baseline_without_a_spread_of_its_own_takes_that_of_p50(tmp_path: Path) -> None:
    """The next step's trajectories all lose; the history is as before but for those."""
    for baseline, mean in (("batch_mean", 0.0), ("per_prompt", 2.5)):
        hook = _hook(tmp_path / baseline, baseline=baseline)
        run_step(hook, 1, _groups(1, [10.0, 0.0, 0.0, 0.0]), algorithm=STD)
        updates, metrics = run_step(hook, 2, _groups(2, [0.0] * 4), algorithm=STD)
        (sample,) = updates[0].samples
        assert float(sample.advantages.max()) == pytest.approx((10.0 - mean) / 5.0, rel=1e-6)
        assert metrics["replay/spread_p50"] == pytest.approx(5.0)
        (row,) = hook.released
        assert row.baseline == mean and row.reward == 10.0


def test_without_any_spread_nothing_is_replayed(tmp_path: Path) -> None:
    """The one group remembered is lost as a whole: no scale is known, and none is made up."""
    hook = _hook(tmp_path, baseline_history=1)
    run_step(hook, 1, _groups(1, [10.0, 0.0]), algorithm=STD)
    updates, metrics = run_step(hook, 2, _groups(2, [0.0, 0.0]), algorithm=STD)
    assert updates == [] and metrics["replay/num_candidates"] == 1
    assert "replay/spread_p50" not in metrics
    (update,), _ = run_step(hook, 3, _groups(3, [10.0, 0.0]), algorithm=STD)
    assert [str(s.trajectory_id) for s in update.samples] == ["1-0/0"]


@pytest.mark.parametrize(
    ("algorithm", "divides"),
    [
        (AlgorithmSection(), False),
        (STD, True),
        (AlgorithmSection(advantage="gigpo"), False),
        (AlgorithmSection(advantage="gigpo", gigpo=GigpoSection(mode="mean_std_norm")), True),
        (AlgorithmSection(advantage="rloo"), False),
        (AlgorithmSection(advantage="reinforce_pp_baseline"), False),
        (AlgorithmSection(gigpo=GigpoSection(mode="mean_std_norm")), False),
    ],
)
def test_who_divides_is_who_divides_new_advantages(
    algorithm: AlgorithmSection, divides: bool
) -> None:
    """A lone winner's advantage grows with its reward, unless the method divides by a spread of
    its group."""
    assert divides_by_spread(algorithm) == divides
    if algorithm.advantage != "reinforce_pp_baseline":
        small, large = (
            turn_advantages(_groups(1, [reward, 0.0, 0.0]), algorithm, 0.0).values()
            for reward in (1.0, 10.0)
        )
        grows = max(v.max() for v in large) > 2 * max(v.max() for v in small)
        assert grows != divides


def test_a_run_divides_by_its_settings(tmp_path: Path) -> None:
    for normalize_std, expected in (("true", 7.5 / 5.0), ("false", 7.5)):
        config = load_config(
            None, [f"algorithm.normalize_std={normalize_std}", "tracking.recorded_groups=0"]
        )
        hooks = make_hooks(config, tmp_path / normalize_std, {}, TokenTexts(str))
        found = _replayed(
            hooks._hooks["built_in.self_imitation"],
            [10.0, 0.0, 0.0, 0.0],
            algorithm=config.algorithm,
        )
        assert found == pytest.approx([expected], rel=1e-6)


REWARDS = st.lists(
    st.tuples(st.floats(-2, 2), st.floats(0, 1), st.booleans()), min_size=2, max_size=5
)


@settings(deadline=None)  # the machine may be busy
@given(REWARDS, st.floats(0, 2))
def test_the_recorded_spread_is_what_new_advantages_are_divided_by(
    rewards: list[tuple[float, float, bool]], weight: float
) -> None:
    """At every mu, invalid turns included; the scale is found from two rewards that differ."""
    members = []
    for number, (outcome, intrinsic, invalid) in enumerate(rewards):
        turns = [make_turn(valid=True), make_turn(valid=not invalid), make_turn(valid=True)]
        reward = Reward(outcome=outcome, intrinsic=intrinsic, format=-0.1 * invalid)
        trajectory = make_trajectory("g", number, (turns,))
        members.append(ScoredTrajectory(trajectory=trajectory, reward=reward))
    group = ScoredGroup(group_id="g", prompt=members[0].trajectory.prompt, members=tuple(members))
    totals = [member.reward.total(weight) for member in members]
    low, high = int(np.argmin(totals)), int(np.argmax(totals))
    history = BaselineHistory(3)
    history.extend(1, [group])
    found = history.spread_p50(weight)
    if totals[high] - totals[low] < 1e-3:
        return
    means = [float(v.mean()) for v in turn_advantages([group], STD, weight).values()]
    scale = (totals[high] - totals[low]) / (means[high] - means[low])
    assert found + STD_EPSILON == pytest.approx(scale, rel=1e-6)
    assert batch_spread([group], weight) == found


def test_the_spread_follows_the_present_intrinsic_weight() -> None:
    """Equal at mu 0 and where the bonus makes up for the outcome; 0.707 apart between."""
    history = BaselineHistory(3)
    tool, none = Reward(outcome=0.0, intrinsic=0.5), Reward(outcome=0.5, intrinsic=0.0)
    history.extend(1, [make_group("a", [tool, none])])
    assert history.spread_p50(0.0) == pytest.approx(0.5 / 2**0.5)
    assert history.spread_p50(2.0) == pytest.approx(0.5 / 2**0.5)
    assert np.isnan(history.spread_p50(1.0)), "0.5 and 0.5"


def test_resume_has_the_spreads_and_a_state_without_them_is_refused() -> None:
    history = BaselineHistory(5)
    history.extend(1, _groups(1, [10.0, 0.0], [3.0, 0.0, 0.0], [1.0, 1.0]))
    state = json.loads(json.dumps(history.state_dict()))
    resumed = BaselineHistory(5)
    resumed.load_state_dict(state)
    assert resumed.spread_p50(0.5) == history.spread_p50(0.5) > 0.0
    older = {name: column for name, column in state.items() if name not in SPREADS}
    with pytest.raises(CheckpointError, match=r"fixed_variance.*the version that wrote it"):
        resumed.load_state_dict(older)
