"""The method against numbers computed by the official code (../shared/golden, see its notes).

Where the default is the corrected method and differs, the difference itself is tested. A match is
|a - b| <= tol * (1 + |b|) with tol 1e-9 (float64) or 2e-4 (float32).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import assert_match, cases

from megatron_spear.algorithms.advantages import group_relative
from megatron_spear.algorithms.aggregation import token_weights
from megatron_spear.algorithms.covariance import (
    covariances,
    drop_quota,
    in_band,
    masked_means,
    ratio_clipped,
)
from megatron_spear.algorithms.filters import keep_groups
from megatron_spear.algorithms.gigpo import discounted_returns
from megatron_spear.algorithms.masked_blocks import masked_blocks
from megatron_spear.algorithms.official.gigpo import gigpo_step_returns
from megatron_spear.algorithms.policy_loss import finish_metrics
from megatron_spear.algorithms.surrogates import Clipped
from megatron_spear.config.losses import ClipCovLossSection
from megatron_spear.config.method import ReplaySection
from megatron_spear.curriculum.schedules import cosine_decay
from megatron_spear.replay.baseline import BaselineHistory
from megatron_spear.replay.index import ReplayIndex
from megatron_spear.replay.selection import recalibrated, select
from megatron_spear.testing.hand_made import make_group, make_sample
from megatron_spear.testing.loss_batch import LossFields, one_loss
from megatron_spear.types import Coefficients, Reward, StepContext


def _loss_and_gradient(case: dict[str, Any]) -> tuple[float, np.ndarray, dict[str, float]]:
    """Our loss in float64 with the weights of the case's mode, its gradient ``[B, T]``, metrics."""
    params = case["params"]
    arrays = {k: torch.tensor(v, dtype=torch.float64) for k, v in case["inputs"].items()}
    rows, width = arrays["mask"].shape
    samples = [
        make_sample(member=i, mask=(row > 0).numpy()) for i, row in enumerate(arrays["mask"])
    ]
    weights = torch.from_numpy(np.concatenate(token_weights(samples, params["agg"], width)))
    if params["agg"] == "seq-mean-token-sum-norm":
        weights *= rows  # defect 11, see test_aggregation
    logprobs = arrays["log_prob"].flatten().requires_grad_()
    batch = LossFields(
        old_logprobs=arrays["old_log_prob"].flatten(),
        advantages=arrays["advantages"].flatten(),
        token_weight=weights,
        origin=torch.zeros(rows * width, dtype=torch.long),
    )
    loss = one_loss(
        Clipped(
            clip_low=params["clip_low"],
            clip_high=params["clip_high"],
            dual_clip=params["dual_clip_c"],
        )
    )
    total, sums = loss(logprobs, None, batch)
    total.backward()
    return total.item(), logprobs.grad.reshape(rows, width).numpy(), finish_metrics(sums)


@pytest.mark.parametrize("case", cases("policy_loss_vanilla"))
def test_policy_loss(case: dict[str, Any]) -> None:
    dtype, expected = case["params"]["dtype"], case["expected"]
    total, gradient, metrics = _loss_and_gradient(case)
    # upstream means over tokens divide by (tokens + 1e-8)
    slack = 1 + 1e-8 / max(np.sum(case["inputs"]["mask"]), 1)
    loss_slack = slack if case["params"]["agg"] == "token-mean" else 1.0
    assert_match(total / loss_slack, expected["pg_loss"], dtype)
    assert_match(gradient / loss_slack, expected["grad_log_prob"], dtype)
    assert_match(metrics.get("policy/clip_fraction", 0.0) / slack, expected["pg_clipfrac"], dtype)
    assert_match(
        metrics.get("policy/dual_clip_fraction", 0.0) / slack, expected["pg_clipfrac_lower"], dtype
    )
    assert_match(metrics.get("policy/kl", 0.0) / slack, expected["ppo_kl"], dtype)


@pytest.mark.parametrize("case", cases("policy_loss_clip_cov"))
def test_covariance_clip_eligibility(case: dict[str, Any]) -> None:
    params, expected, inputs = case["params"], case["expected"], case["inputs"]
    dtype = np.float64 if params["dtype"] == "float64" else np.float32
    logprobs, old, advantages = (
        np.array(inputs[name], dtype).ravel() for name in ("log_prob", "old_log_prob", "advantages")
    )
    shape = np.shape(inputs["mask"])
    mask = np.array(inputs["mask"]).ravel() > 0
    section = ClipCovLossSection(
        fraction=params["cov_ratio"], low=params["cov_lb"], high=params["cov_ub"]
    )
    sample = replace(make_sample(mask=mask.tolist()), advantages=advantages)
    blocks = masked_blocks([sample], [logprobs])
    covariance = covariances(logprobs[mask], advantages[mask], masked_means(blocks))
    clipped = ratio_clipped(logprobs, old, advantages, params["clip_low"], params["clip_high"])
    recorded = np.array(expected["covariance"], np.float64).ravel()
    assert (np.isfinite(recorded) == (mask & ~clipped)).all(), "-inf marks what cannot be dropped"
    open_to_drop = np.isfinite(recorded)
    # upstream's masked means divide by (tokens + 1e-8), which moves a covariance by as much
    got = covariance[open_to_drop[mask]]
    assert_match(got, recorded[open_to_drop], params["dtype"], float64=2e-8)
    band = np.flatnonzero(mask)[in_band(covariance, section)]
    eligible = band[~clipped[band]]
    assert np.transpose(np.unravel_index(eligible, shape)).tolist() == expected["eligible"]
    quota = drop_quota(section.fraction, int(mask.sum()), len(eligible))
    assert quota == len(expected["dropped"])


@pytest.mark.parametrize("case", cases("grpo_advantage"))
def test_grpo_advantage(case: dict[str, Any]) -> None:
    rewards = np.array(case["inputs"]["token_level_rewards"], np.float64).sum(1)
    mask = np.array(case["inputs"]["mask"])
    uids = np.array(case["inputs"]["uid"])
    for name, normalize_std in (("norm_std", True), ("no_std", False)):
        got, expected = np.zeros_like(mask), np.array(case["expected"][name])
        for uid in dict.fromkeys(uids):
            rows = np.flatnonzero(uids == uid)
            values, _ = group_relative(rewards[rows], normalize_std=normalize_std)
            got[rows] = values[:, None] * mask[rows]
            if len(rows) == 1:  # defect 17: the official advantage is the raw reward; ours is 0
                assert not got[rows].any()
                raw = rewards[rows, None] * mask[rows] / (1 + 1e-6 * normalize_std)
                assert_match(raw, expected[rows], case["params"]["dtype"])
                expected[rows] = 0.0
        assert_match(got, expected, case["params"]["dtype"])


@pytest.mark.parametrize("case", cases("agg_loss"))
def test_aggregation(case: dict[str, Any]) -> None:
    losses = np.array(case["inputs"]["loss_mat"], np.float64)
    masks = np.array(case["inputs"]["mask"]) > 0
    rows, width = losses.shape
    samples = [make_sample(member=i, mask=mask) for i, mask in enumerate(masks)]

    def loss(mode: str) -> float:
        return float((np.stack(token_weights(samples, mode, width)) * losses)[masks].sum())

    dtype, expected = case["params"]["dtype"], case["expected"]
    slack = 1 + 1e-8 / max(masks.sum(), 1)
    assert_match(loss("token-mean") / slack, expected["token-mean"], dtype)
    assert_match(loss("seq-mean-token-sum"), expected["seq-mean-token-sum"], dtype)
    if masks.any(1).all():
        assert_match(loss("seq-mean-token-mean"), expected["seq-mean-token-mean"], dtype)
    else:  # 0/0 there; an empty row adds nothing here
        assert expected["seq-mean-token-mean"] == "nan"
        assert np.isfinite(loss("seq-mean-token-mean"))
    # defect 11: the official sum is over padded width alone, ours over the trajectories too
    ours = loss("seq-mean-token-sum-norm") * rows
    assert_match(ours, expected["seq-mean-token-sum-norm"], dtype)


@pytest.mark.parametrize("case", cases("gigpo_step_returns"))
def test_discounted_returns(case: dict[str, Any]) -> None:
    rewards, trajectories = (np.array(case["inputs"][name]) for name in ("rewards", "traj_uid"))
    discount, expected = case["params"]["gamma"], np.array(case["expected"]["step_returns"])
    official = gigpo_step_returns(rewards, trajectories, discount=discount)
    assert official.dtype == np.float32
    assert official.tolist() == expected.tolist(), "the same float32 numbers, to the bit"
    for name in set(trajectories):  # ours are float64, the recorded ones float32
        rows = trajectories == name
        assert_match(discounted_returns(rewards[rows], discount), expected[rows], "float32")


@pytest.mark.parametrize("case", cases("tool_call_reward", variant="linear", mode="cosine"))
def test_intrinsic_weight_schedule(case: dict[str, Any]) -> None:
    for row, expected in zip(case["inputs"]["rows"], case["expected"]["rows"], strict=True):
        intrinsic = min(0.1 * row["tool_calls"], 1.0) if row["tools_available"] else 0.0
        reward = Reward(outcome=row["outcome"], intrinsic=intrinsic)
        weight = cosine_decay(row["global_step"], row["max_steps"])
        assert_match(reward.total(weight), expected["score"], "float64")


@pytest.mark.parametrize("case", cases("recalibrated_advantage"))
def test_recalibrated_advantage(case: dict[str, Any]) -> None:
    inputs, expected, dtype = case["inputs"], case["expected"], case["params"]["dtype"]
    rewards = np.array(inputs["token_level_rewards"], dtype).sum(1).astype(np.float64)
    masks = np.array(inputs["mask"]) > 0
    # rounded to the case's dtype, in which a reward may tie with the median
    means = np.array(inputs["group_mean_history"], dtype).astype(np.float64)
    history = BaselineHistory(len(means))
    history.extend(1, [make_group(str(i), [mean]) for i, mean in enumerate(means)])
    assert_match(history.p50(0.0), expected["mean_p50"], dtype)
    index = _index(rewards)
    coefficients = Coefficients(intrinsic_weight=0.0, replay_weight=1.0)
    ctx = StepContext(step=1, policy_version=0, coefficients=coefficients, seed=0)
    section = ReplaySection(max_age=0, rows_per_step=len(rewards))
    selection = select(index, index.rewards(0.0) - history.p50(0.0), ctx, section)
    # a row without trained tokens has no advantage at collection, so it never enters our store
    kept = [i in selection.row_ids and bool(masks[i].any()) for i in range(len(rewards))]
    assert kept == expected["keep_no_std"]
    for row_id, advantage in zip(selection.row_ids, selection.advantages, strict=True):
        (sample,) = recalibrated([make_sample(mask=masks[row_id])], advantage)
        assert_match(sample.advantages, expected["no_std"][row_id], "float32")
        assert_match(advantage * masks[row_id], expected["no_std"][row_id], dtype)


@pytest.mark.parametrize("case", cases("group_std_filter", type="std"))
def test_group_filter(case: dict[str, Any]) -> None:
    params, size = case["params"], case["params"]["group_size"]
    scores = np.array(case["inputs"]["scores"]).reshape(-1, size)
    groups = [make_group(f"{i:03d}", list(row)) for i, row in enumerate(scores)]
    kept, metrics = keep_groups(groups, params["ratio"], 0.0)
    rows = [int(group.group_id) * size + i for group in kept for i in range(size)]
    assert rows == case["expected"]["kept_rows"]
    recorded = case["expected"]["metrics"]
    assert_match(metrics["filter/spread_mean"], recorded["rollout/in_group_std"], "float32")
    chosen = recorded["rollout/chosen_in_group_std"]
    assert_match(metrics["filter/kept_spread_mean"], chosen, "float32")


def _index(rewards: np.ndarray) -> ReplayIndex:
    """Stored rows with these outcomes and nothing else."""
    rows = np.arange(len(rewards))
    numbers = {name: np.zeros(len(rows)) for name in ("intrinsic", "format", "advantages")}
    return ReplayIndex(
        row_ids=rows,
        policy_versions=np.zeros_like(rows),
        outcome=rewards,
        num_tokens=np.ones_like(rows),
        prompt_keys=rows.astype(np.uint64),
        trajectory_keys=rows.astype(np.uint64),
        **numbers,
    )
