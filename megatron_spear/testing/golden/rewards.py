"""Official graders, reward shaping and filters against recorded numbers."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from megatron_spear.algorithms.official.filters import (
    drop_equal_blocks,
    keep_spread_blocks,
    keep_spread_prompts,
    power_of_two_cut,
)
from megatron_spear.envs.views import void_action
from megatron_spear.rewards.graders import official_minerva, official_strict
from megatron_spear.rewards.official_shaping import (
    official_turn_rewards,
    on_last_token,
    penalize_invalid,
)
from megatron_spear.rewards.row_filters import overlong, repetitive
from megatron_spear.rewards.tool_calls import (
    official_retool_reward,
    official_tool_reward,
    official_weight,
)
from megatron_spear.testing.golden.compare import (
    Case,
    Check,
    named_differences,
    number_differences,
    value_differences,
)

RETOOL: dict[str, Literal["turns", "any_tool", "any_tool_or_turns"]] = {
    "compute_score": "turns",
    "compute_score_wtool": "any_tool",
    "compute_score_wtool_neg": "any_tool_or_turns",
}
KEEP: dict[str, Literal["highest", "lowest"]] = {"std": "highest", "std_rev": "lowest"}
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


def check_graders(case: Case) -> Iterator[str]:
    grader = official_strict if case["params"]["strict"] else official_minerva
    rows = zip(case["inputs"]["texts"], case["expected"]["rows"], strict=True)
    for number, (text, row) in enumerate(rows):
        got = grader(text, case["params"]["ground_truth"])
        yield from value_differences(f"row {number}", got, (row["score"], row["pred"]))


def check_tool_reward(case: Case) -> Iterator[str]:
    params = case["params"]
    rows = zip(case["inputs"]["rows"], case["expected"]["rows"], strict=True)
    for number, (row, recorded) in enumerate(rows):
        intrinsic = official_tool_reward(
            row["tool_calls"],
            row["outcome"],
            params["variant"],
            tools_available=row["tools_available"],
            per_call=params["per_call"],
            maximum=params["cap"],
        )
        weight = official_weight(params["mode"], row["global_step"], row["max_steps"])
        score = row["outcome"] + weight * intrinsic
        yield from number_differences(f"row {number} score", score, recorded["score"], "float64")


def check_retool_reward(case: Case) -> Iterator[str]:
    variant = RETOOL[case["params"]["function"]]
    got = [
        official_retool_reward(row["correct"], row["num_turns"], variant)
        for row in case["inputs"]["rows"]
    ]
    yield from number_differences("score", got, case["expected"]["score"], "float64")


def check_agent_shaping(case: Case) -> Iterator[str]:
    params, inputs, expected = case["params"], case["inputs"], case["expected"]
    width, lengths = params["max_response_len"], np.array(inputs["valid_response_length"])
    rewards = official_turn_rewards(
        inputs["episode_rewards"],
        inputs["episode_lengths"],
        official_weight(params["mode"], params["global_step"], params["max_steps"]),
        normalize_by_length=params["normalize_by_length"],
    )
    tensor = on_last_token(rewards, lengths, width)
    yield from number_differences("reward_tensor", tensor, expected["reward_tensor"], "float32")
    incomplete = [void_action(text) for text in inputs["texts"]]
    yield from value_differences("is_incomplete", incomplete, expected["is_incomplete"])
    too_long = [bool(overlong(length, width)) for length in lengths]
    yield from value_differences("is_overlong", too_long, expected["is_overlong"])


def check_invalid_action_penalty(case: Case) -> Iterator[str]:
    inputs, expected = case["inputs"], case["expected"]
    rewards, returns, share = penalize_invalid(
        np.array(inputs["token_level_scores"], np.float32),
        np.array(inputs["valid_response_length"]),
        np.array(inputs["is_action_valid"]),
        case["params"]["coef"],
        inputs["step_rewards"],
    )
    got = {"token_level_scores": rewards, "valid_action_ratio": share}
    recorded = {name: expected[name] for name in got}
    yield from named_differences(got, recorded, "float32")
    if returns is None or expected["step_rewards"] is None:
        yield from value_differences("step_rewards", returns, expected["step_rewards"])
    else:
        yield from number_differences("step_rewards", returns, expected["step_rewards"], "float32")


def check_void_action(case: Case) -> Iterator[str]:
    valid = not void_action(case["inputs"]["text"])
    yield from value_differences("valid", valid, case["expected"]["valid"])


def check_repetition(case: Case) -> Iterator[str]:
    params = case["params"]
    got = repetitive(case["inputs"]["tokens"], params["n"], params["threshold"])
    yield from value_differences("repetitive", got, case["expected"]["repetitive"])


def check_spread_of_blocks(case: Case) -> Iterator[str]:
    params, expected = case["params"], case["expected"]
    rows, metrics = keep_spread_blocks(
        case["inputs"]["scores"], params["group_size"], params["ratio"], KEEP[params["type"]]
    )
    yield from value_differences("kept_rows", rows.tolist(), expected["kept_rows"])
    yield from _metric_differences(metrics, expected["metrics"], METRICS)


def check_spread_of_prompts(case: Case) -> Iterator[str]:
    params, inputs, expected = case["params"], case["inputs"], case["expected"]
    rows, prompts, metrics = keep_spread_prompts(
        inputs["scores"], inputs["uid"], inputs["traj_uid"], params["ratio"], KEEP[params["type"]]
    )
    kept = expected["kept_groups_before_pow2"]
    yield from value_differences("kept_groups_before_pow2", list(prompts), kept)
    yield from _metric_differences(metrics, expected["metrics"], AGENT_METRICS)
    order, candidates = inputs["shuffled_candidate_rows"], rows.tolist()
    if order is None:  # nothing was filtered, so nothing is cut
        yield from value_differences("ratio", params["ratio"], 1.0)
        yield from value_differences("kept_rows", candidates, expected["kept_rows"])
    else:
        yield from value_differences("candidate rows", candidates, sorted(order))
        cut = power_of_two_cut(order).tolist()
        yield from value_differences("kept_rows", cut, expected["kept_rows"])


def check_dynamic_sampling(case: Case) -> Iterator[str]:
    params = case["params"]
    rows = drop_equal_blocks(
        case["inputs"]["episode_rewards"], params["group_size"], last_try=params["last_try"]
    )
    yield from value_differences("kept_rows", rows.tolist(), case["expected"]["kept_rows"])


def _metric_differences(
    metrics: dict[str, float], recorded: dict[str, float], names: dict[str, str]
) -> Iterator[str]:
    got = {}
    for name, official in names.items():
        got[f"rollout/{official}"] = metrics[f"filter/{name}"]
        got[f"rollout/chosen_{official}"] = metrics[f"filter/kept_{name}"]
    yield from named_differences(got, recorded, "float32")


CHECKS: dict[str, Check] = {
    "math_outcome_reward": check_graders,
    "tool_call_reward": check_tool_reward,
    "retool_turn_reward": check_retool_reward,
    "episode_reward": check_agent_shaping,
    "invalid_action_penalty": check_invalid_action_penalty,
    "void_action_filter": check_void_action,
    "repetition_filter": check_repetition,
    "group_std_filter": check_spread_of_blocks,
    "group_std_filter_agent": check_spread_of_prompts,
    "dynamic_sampling_filter": check_dynamic_sampling,
}
