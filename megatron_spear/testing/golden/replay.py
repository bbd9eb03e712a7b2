"""The official replay buffers against recorded scenarios of 10 to 20 trainer steps."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np

from megatron_spear.algorithms.official.advantages import grpo_advantage
from megatron_spear.replay.official import (
    IndexArray,
    OfficialReplayBuffer,
    OfficialReplayRules,
    OfficialRows,
)
from megatron_spear.testing.golden.compare import (
    Case,
    Check,
    number_differences,
    value_differences,
)


def check_buffer(case: Case, *, tree: Literal["math", "agent"]) -> Iterator[str]:
    """Each step: fullness, what is released, then what is stored and remembered."""
    params = case["params"]
    buffer = OfficialReplayBuffer(
        OfficialReplayRules(
            tree=tree,
            capacity=params["buffer_size"],
            max_history_groups=params["baseline_buffer_size"],
            tolerate_steps=params["tolerate_steps"],
            group_size=params["group_size"],
            weight_decay=params["weight_decay"],
            normalize_std=params["norm_by_std"],
        )
    )
    releases = 0
    for given, expected in zip(case["inputs"]["steps"], case["expected"]["steps"], strict=True):
        releases += "replay" in expected
        for line in _step_differences(buffer, given, expected, params):
            yield f"step {given['step']}, {line}"
    yield from value_differences("replays", releases, params["replays"])


def _step_differences(
    buffer: OfficialReplayBuffer,
    given: dict[str, Any],
    expected: dict[str, Any],
    params: dict[str, Any],
) -> Iterator[str]:
    dtype = params["dtype"]
    rows = OfficialRows(
        row_ids=np.array(given["rows"]),
        uid=np.array(given["uid"]),
        traj_uid=np.array(given["traj_uid"]),
        rewards=np.array(given["final_rewards"], dtype),
        has_tool_call=np.array(given["has_tool_call"]),
        mask=np.array(given["mask"], dtype),
        advantages=np.array(expected["advantages_in"], dtype),
    )
    computed = grpo_advantage(
        rows.rewards[:, None], rows.mask, rows.uid, normalize_std=params["norm_by_std"]
    )
    yield from number_differences("advantages_in", computed, rows.advantages, dtype)
    yield from value_differences("full_before", buffer.is_full(), expected["full_before"])
    yield from _release_differences(buffer, expected.get("replay"), dtype)
    buffer.add(given["step"], rows)
    yield from value_differences("buffer_rows_after", buffer.row_ids, expected["buffer_rows_after"])
    yield from value_differences("buffer_steps_after", buffer.steps, expected["buffer_steps_after"])
    yield from value_differences("count_after", buffer.count(), expected["count_after"])
    for name, history in (("mean", buffer.group_means), ("std", buffer.group_stds)):
        key = f"group_{name}_history"
        steps = [step for step, _ in expected[key]]
        yield from value_differences(f"{key} steps", [step for step, _ in history], steps)
        for (step, got), (_, recorded) in zip(history, expected[key], strict=False):
            yield from number_differences(f"{key} of step {step}", got, recorded, dtype)


def _release_differences(
    buffer: OfficialReplayBuffer, expected: dict[str, Any] | None, dtype: str
) -> Iterator[str]:
    """The release under the recorded permutation; lines where only one side releases."""
    stored, asked = buffer.row_ids, []

    def replayed(count: int) -> IndexArray:
        asked.append(count)
        order = expected["perm"] if expected else range(count)
        return np.array(order, np.intp)

    release = buffer.take(replayed)
    if release is None or expected is None:
        yield from value_differences("released", release is not None, expected is not None)
        return
    yield from value_differences("buffer_rows", stored, expected["buffer_rows"])
    yield from value_differences("kept rows", asked, [len(expected["perm"])])
    yield from value_differences("rows", release.rows.row_ids.tolist(), expected["rows"])
    for name, got in (
        ("advantages", release.advantages),
        ("reward_mean_50p", release.baseline),
        ("reward_std_50p", release.scale),
    ):
        yield from number_differences(name, got, expected[name], dtype)


CHECKS: dict[str, Check] = {
    "replay_buffer_math": partial(check_buffer, tree="math"),
    "replay_buffer_agent": partial(check_buffer, tree="agent"),
}
