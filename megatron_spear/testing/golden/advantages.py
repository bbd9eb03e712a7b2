"""Official advantages against recorded numbers: GRPO and relatives, recalibrated, GiGPO."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.official import advantages as official
from megatron_spear.algorithms.official import gigpo
from megatron_spear.testing.golden.compare import (
    TOLERANCE,
    Case,
    Check,
    named_differences,
    number_differences,
    value_differences,
)

ROWS = ("token_level_rewards", "mask", "uid", "traj_uid")
IN_PRECISION = ("token_level_rewards", "mask", "step_rewards")
MODES: tuple[gigpo.Mode, ...] = ("mean_norm", "mean_std_norm")
# Where float32 numbers of (nearly) no spread were divided by their std, rounding decides.
FLAT_TOLERANCE, FLAT_SPREAD = 2e-2, 1e-5


def _arrays(case: Case, *names: str) -> list[npt.NDArray[Any]]:
    """Inputs by name; what is a number in the case's precision."""
    dtype = case["params"]["dtype"]
    return [
        np.array(value, dtype if name in IN_PRECISION else None)
        for name, value in ((name, case["inputs"][name]) for name in names)
    ]


def check_grpo(case: Case) -> Iterator[str]:
    arrays = _arrays(case, *ROWS[:3])
    got = {
        name: official.grpo_advantage(*arrays, normalize_std=normalize_std)
        for name, normalize_std in (("norm_std", True), ("no_std", False))
    }
    yield from named_differences(got, case["expected"], case["params"]["dtype"])


def check_grpo_of_turns(case: Case) -> Iterator[str]:
    arrays = _arrays(case, *ROWS)
    got = {
        f"cross={cross},std={normalize_std}": official.grpo_step_sample_advantage(
            *arrays, cross=cross, normalize_std=normalize_std
        )
        for cross in (True, False)
        for normalize_std in (True, False)
    }
    yield from named_differences(got, case["expected"], case["params"]["dtype"])


def check_other_advantages(case: Case) -> Iterator[str]:
    arrays = _arrays(case, *ROWS[:3])
    got = {
        "rloo": official.rloo_advantage(*arrays),
        "reinforce_pp_baseline": official.reinforce_pp_baseline_advantage(*arrays),
        "passk_std": official.pass_at_k_advantage(*arrays, normalize_std=True),
        "passk_nostd": official.pass_at_k_advantage(*arrays, normalize_std=False),
    }
    yield from named_differences(got, case["expected"], case["params"]["dtype"])


def check_recalibrated(case: Case) -> Iterator[str]:
    params, expected = case["params"], case["expected"]
    arrays = _arrays(case, *ROWS[:2], "group_mean_history", "group_std_history")
    for name, normalize_std in (("norm_std", True), ("no_std", False)):
        got = official.recalibrated_advantage(
            *arrays, normalize_std=normalize_std, percentile=params["percentile"]
        )
        values = {"mean_p50": got.mean, "std_p50": got.std, name: got.advantages}
        recorded = {key: expected[key] for key in values}
        yield from named_differences(values, recorded, params["dtype"])
        for key, kept in ((f"keep_{name}", got.keep), (f"keep_ge_{name}", got.keep_ge)):
            yield from value_differences(key, kept.tolist(), expected[key])


def check_gigpo_step_returns(case: Case) -> Iterator[str]:
    """Whatever the case's dtype, the official returns are float32."""
    rewards, trajectories = (np.array(case["inputs"][name]) for name in ("rewards", "traj_uid"))
    got = gigpo.gigpo_step_returns(rewards, trajectories, discount=case["params"]["gamma"])
    yield from number_differences("step_returns", got, case["expected"]["step_returns"], "float32")


def flat_rows(values: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """bool ``[N]``: rows of a group of several whose values are equal up to a rounding.

    ``flat_rows([1, 1, 2, 5], [0, 0, 1, 1]) == [True, True, False, False]``; a group of one has no
    std, so it is not flat.
    """
    flat = np.zeros(len(values), np.bool_)
    for rows in official.groups(labels):
        largest = np.abs(values[rows]).max()
        flat[rows] = len(rows) > 1 and np.ptp(values[rows]) <= FLAT_SPREAD * (1 + largest)
    return flat


def check_gigpo(case: Case) -> Iterator[str]:
    expected, dtype = case["expected"], case["params"]["dtype"]
    scores, mask, uid, traj_uid = _arrays(case, *ROWS)
    returns, anchors = _arrays(case, "step_rewards", "anchor_obs")
    labels = gigpo.gigpo_step_labels(anchors, uid)
    yield from value_differences(
        "step_group_labels", labels.tolist(), expected["step_group_labels"]
    )
    got = {}
    for mode in MODES:
        for weight in (1.0, 0.5):
            got[f"{mode},w={weight}"] = gigpo.gigpo_advantage(
                scores, returns, mask, anchors, uid, traj_uid, mode=mode, step_weight=weight
            )
        for name, cross in (("episode", True), ("episode_per_traj", False)):
            got[f"{name},{mode}"] = gigpo.gigpo_episode_advantage(
                scores, mask, uid, traj_uid, mode=mode, cross=cross
            )
        got[f"step,{mode}"] = gigpo.gigpo_step_advantage(returns, mask, anchors, uid, mode=mode)
    names = sorted([*got, "step_group_labels"])
    yield from value_differences("names", names, sorted(expected))
    flat = flat_rows(scores.sum(1), uid) | flat_rows(returns, labels)
    for name, values in got.items():
        rounded = flat & (dtype == "float32" and "mean_std_norm" in name)
        tolerance = np.where(rounded, FLAT_TOLERANCE, TOLERANCE[dtype])[:, None]
        yield from number_differences(name, values, expected[name], dtype, tolerance=tolerance)


CHECKS: dict[str, Check] = {
    "grpo_advantage": check_grpo,
    "grpo_step_sample_advantage": check_grpo_of_turns,
    "other_advantages": check_other_advantages,
    "recalibrated_advantage": check_recalibrated,
    "gigpo_step_returns": check_gigpo_step_returns,
    "gigpo_advantage": check_gigpo,
}
