"""The official mode's advantages against the official code's numbers (../shared/golden).

A match is |a - b| <= tol * (1 + |b|) with tol 1e-9 (float64) or 2e-4 (float32), and 2e-2 where
float32 numbers of (nearly) no spread were divided by their std. The default method, where it
differs, is in tests/unit/algorithms.
"""

from typing import Any

import numpy as np
import pytest
from golden_vectors import assert_match, cases

from megatron_spear.algorithms.gigpo import discounted_returns
from megatron_spear.algorithms.official import advantages as official
from megatron_spear.algorithms.official import gigpo

ROWS = ("token_level_rewards", "mask", "uid", "traj_uid")


def _arrays(case: dict[str, Any], *names: str) -> list[np.ndarray]:
    """Inputs by name; what is a number in the case's precision."""
    dtype = case["params"]["dtype"]
    return [
        np.array(value, dtype) if name in ("token_level_rewards", "mask") else np.array(value)
        for name, value in ((name, case["inputs"][name]) for name in names)
    ]


@pytest.mark.parametrize("case", cases("grpo_advantage"))
def test_grpo(case: dict[str, Any]) -> None:
    arrays = _arrays(case, *ROWS[:3])
    for name, normalize_std in (("norm_std", True), ("no_std", False)):
        got = official.grpo_advantage(*arrays, normalize_std=normalize_std)
        assert_match(got, case["expected"][name], case["params"]["dtype"])


@pytest.mark.parametrize("case", cases("grpo_step_sample_advantage"))
def test_grpo_of_turns(case: dict[str, Any]) -> None:
    arrays = _arrays(case, *ROWS)
    for cross in (True, False):
        for normalize_std in (True, False):
            got = official.grpo_step_sample_advantage(
                *arrays, cross=cross, normalize_std=normalize_std
            )
            expected = case["expected"][f"cross={cross},std={normalize_std}"]
            assert_match(got, expected, case["params"]["dtype"])


@pytest.mark.parametrize("case", cases("other_advantages"))
def test_other_advantages(case: dict[str, Any]) -> None:
    arrays, expected = _arrays(case, *ROWS[:3]), case["expected"]
    got = {
        "rloo": official.rloo_advantage(*arrays),
        "reinforce_pp_baseline": official.reinforce_pp_baseline_advantage(*arrays),
        "passk_std": official.pass_at_k_advantage(*arrays, normalize_std=True),
        "passk_nostd": official.pass_at_k_advantage(*arrays, normalize_std=False),
    }
    assert got.keys() == expected.keys()
    for name, values in got.items():
        assert_match(values, expected[name], case["params"]["dtype"])


@pytest.mark.parametrize("case", cases("recalibrated_advantage"))
def test_recalibrated(case: dict[str, Any]) -> None:
    params, expected = case["params"], case["expected"]
    arrays = _arrays(case, *ROWS[:2], "group_mean_history", "group_std_history")
    for name, normalize_std in (("norm_std", True), ("no_std", False)):
        got = official.recalibrated_advantage(
            *arrays, normalize_std=normalize_std, percentile=params["percentile"]
        )
        assert_match(got.mean, expected["mean_p50"], params["dtype"])
        assert_match(got.std, expected["std_p50"], params["dtype"])
        assert_match(got.advantages, expected[name], params["dtype"])
        assert got.keep.tolist() == expected[f"keep_{name}"]
        assert got.keep_ge.tolist() == expected[f"keep_ge_{name}"]


@pytest.mark.parametrize("case", cases("gigpo_step_returns"))
def test_gigpo_step_returns(case: dict[str, Any]) -> None:
    rewards, trajectories = (np.array(case["inputs"][name]) for name in ("rewards", "traj_uid"))
    discount, expected = case["params"]["gamma"], np.array(case["expected"]["step_returns"])
    got = gigpo.gigpo_step_returns(rewards, trajectories, discount=discount)
    assert got.dtype == np.float32
    assert got.tolist() == expected.tolist()
    for name in set(trajectories):  # the default's float64 returns, within the recorded precision
        rows = trajectories == name
        assert_match(discounted_returns(rewards[rows], discount), expected[rows], "float32")


@pytest.mark.parametrize("case", cases("gigpo_advantage"))
def test_gigpo(case: dict[str, Any]) -> None:
    expected, dtype = case["expected"], case["params"]["dtype"]
    scores, mask, uid, traj_uid = _arrays(case, *ROWS)
    returns, anchors = _arrays(case, "step_rewards", "anchor_obs")
    assert gigpo.gigpo_step_labels(anchors, uid).tolist() == expected["step_group_labels"]
    found = {"step_group_labels"}
    for mode in ("mean_norm", "mean_std_norm"):
        got = {
            f"{mode},w={weight}": gigpo.gigpo_advantage(
                scores, returns, mask, anchors, uid, traj_uid, mode=mode, step_weight=weight
            )
            for weight in (1.0, 0.5)
        }
        for name, cross in (("episode", True), ("episode_per_traj", False)):
            got[f"{name},{mode}"] = gigpo.gigpo_episode_advantage(
                scores, mask, uid, traj_uid, mode=mode, cross=cross
            )
        got[f"step,{mode}"] = gigpo.gigpo_step_advantage(returns, mask, anchors, uid, mode=mode)
        for name, values in got.items():
            assert_match(values, expected[name], dtype)
        found |= got.keys()
    assert found == expected.keys()
