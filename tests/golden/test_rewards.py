"""Graders, shaping and filters against numbers computed by the official code.

See `test_method` for where they come from and what a match is.
"""

from typing import Any

import numpy as np
import pytest
from test_method import assert_match, cases

from megatron_spear.algorithms.official.filters import (
    drop_equal_blocks,
    keep_spread_blocks,
    keep_spread_prompts,
    power_of_two_cut,
)
from megatron_spear.rewards.graders import official_minerva, official_strict
from megatron_spear.rewards.official_shaping import (
    official_turn_rewards,
    on_last_token,
    penalize_invalid,
)
from megatron_spear.rewards.row_filters import overlong, repetitive, void_action
from megatron_spear.rewards.tool_calls import (
    official_retool_reward,
    official_tool_reward,
    official_weight,
)

RETOOL = {
    "compute_score": "turns",
    "compute_score_wtool": "any_tool",
    "compute_score_wtool_neg": "any_tool_or_turns",
}
KEEP = {"std": "highest", "std_rev": "lowest"}
# Our names; what is called in_group_max is the mean of the groups' best rows in one tree, and the
# highest group mean in the other.
METRICS = {
    "spread_mean": "in_group_std",
    "best_mean": "in_group_max",
    "score_mean": "in_group_mean",
}
AGENT_METRICS = {
    "spread_mean": "in_group_std",
    "score_max": "in_group_max",
    "score_mean": "in_group_mean",
}


@pytest.mark.parametrize("case", cases("math_outcome_reward"))
def test_official_graders(case: dict[str, Any]) -> None:
    grader = official_strict if case["params"]["strict"] else official_minerva
    for text, row in zip(case["inputs"]["texts"], case["expected"]["rows"], strict=True):
        assert grader(text, case["params"]["ground_truth"]) == (row["score"], row["pred"])


@pytest.mark.parametrize("case", cases("tool_call_reward"))
def test_official_tool_reward(case: dict[str, Any]) -> None:
    params = case["params"]
    for row, expected in zip(case["inputs"]["rows"], case["expected"]["rows"], strict=True):
        intrinsic = official_tool_reward(
            row["tool_calls"],
            row["outcome"],
            params["variant"],
            tools_available=row["tools_available"],
            per_call=params["per_call"],
            maximum=params["cap"],
        )
        weight = official_weight(params["mode"], row["global_step"], row["max_steps"])
        assert_match(row["outcome"] + weight * intrinsic, expected["score"], "float64")


@pytest.mark.parametrize("case", cases("retool_turn_reward"))
def test_retool_reward(case: dict[str, Any]) -> None:
    variant = RETOOL[case["params"]["function"]]
    got = [
        official_retool_reward(row["correct"], row["num_turns"], variant)
        for row in case["inputs"]["rows"]
    ]
    assert_match(got, case["expected"]["score"], "float64")


@pytest.mark.parametrize("case", cases("episode_reward"))
def test_agent_shaping(case: dict[str, Any]) -> None:
    params, inputs, expected = case["params"], case["inputs"], case["expected"]
    width, lengths = params["max_response_len"], np.array(inputs["valid_response_length"])
    rewards = official_turn_rewards(
        inputs["episode_rewards"],
        inputs["episode_lengths"],
        official_weight(params["mode"], params["global_step"], params["max_steps"]),
        normalize_by_length=params["normalize_by_length"],
    )
    assert_match(on_last_token(rewards, lengths, width), expected["reward_tensor"], "float32")
    assert [void_action(text) for text in inputs["texts"]] == expected["is_incomplete"]
    assert [overlong(length, width) for length in lengths] == expected["is_overlong"]


@pytest.mark.parametrize("case", cases("invalid_action_penalty"))
def test_invalid_action_penalty(case: dict[str, Any]) -> None:
    inputs, expected = case["inputs"], case["expected"]
    rewards, returns, share = penalize_invalid(
        np.array(inputs["token_level_scores"], np.float32),
        np.array(inputs["valid_response_length"]),
        np.array(inputs["is_action_valid"]),
        case["params"]["coef"],
        inputs["step_rewards"],
    )
    assert_match(rewards, expected["token_level_scores"], "float32")
    assert_match(share, expected["valid_action_ratio"], "float32")
    if expected["step_rewards"] is None:
        assert returns is None
    else:
        assert_match(returns, expected["step_rewards"], "float32")


@pytest.mark.parametrize("case", cases("void_action_filter"))
def test_void_action(case: dict[str, Any]) -> None:
    assert void_action(case["inputs"]["text"]) is not case["expected"]["valid"]


@pytest.mark.parametrize("case", cases("repetition_filter"))
def test_repetition(case: dict[str, Any]) -> None:
    params = case["params"]
    got = repetitive(case["inputs"]["tokens"], params["n"], params["threshold"])
    assert got is case["expected"]["repetitive"]


@pytest.mark.parametrize("case", cases("group_std_filter"))
def test_spread_of_blocks(case: dict[str, Any]) -> None:
    params = case["params"]
    rows, metrics = keep_spread_blocks(
        case["inputs"]["scores"], params["group_size"], params["ratio"], KEEP[params["type"]]
    )
    assert rows.tolist() == case["expected"]["kept_rows"]
    assert_metrics(metrics, case["expected"]["metrics"], METRICS)


@pytest.mark.parametrize("case", cases("group_std_filter_agent"))
def test_spread_of_prompts(case: dict[str, Any]) -> None:
    params, inputs, expected = case["params"], case["inputs"], case["expected"]
    rows, prompts, metrics = keep_spread_prompts(
        inputs["scores"], inputs["uid"], inputs["traj_uid"], params["ratio"], KEEP[params["type"]]
    )
    assert list(prompts) == expected["kept_groups_before_pow2"]
    assert_metrics(metrics, expected["metrics"], AGENT_METRICS)
    order = inputs["shuffled_candidate_rows"]
    if order is None:  # nothing was filtered, so nothing is cut
        assert params["ratio"] == 1.0 and rows.tolist() == expected["kept_rows"]
    else:
        assert sorted(order) == rows.tolist()
        assert power_of_two_cut(order).tolist() == expected["kept_rows"]


@pytest.mark.parametrize("case", cases("dynamic_sampling_filter"))
def test_dynamic_sampling(case: dict[str, Any]) -> None:
    params = case["params"]
    rows = drop_equal_blocks(
        case["inputs"]["episode_rewards"], params["group_size"], last_try=params["last_try"]
    )
    assert rows.tolist() == case["expected"]["kept_rows"]


def assert_metrics(
    got: dict[str, float], expected: dict[str, float], names: dict[str, str]
) -> None:
    assert len(expected) == 2 * len(names)
    for name, official in names.items():
        assert_match(got[f"filter/{name}"], expected[f"rollout/{official}"], "float32")
        chosen = expected[f"rollout/chosen_{official}"]
        assert_match(got[f"filter/kept_{name}"], chosen, "float32")
