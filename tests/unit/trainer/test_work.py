"""FLOPs and tokens of a step: by hand, against torch's counter, and what the metrics say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_spear.conversion.shape import model_shape
from megatron_spear.testing.hand_made import (
    ONE_LAYER,
    make_prompt,
    make_sample,
    make_trajectory,
    make_turn,
)
from megatron_spear.testing.tiny import tiny_hf_folder
from megatron_spear.trainer.work import (
    PassWork,
    forward_flops,
    policy_work,
    rollout_work,
    work_metrics,
)
from megatron_spear.types import Origin, Status, TrajectoryGroup


def test_by_hand() -> None:
    # Per token: 4 matrices of 2 x 2, 3 of 2 x 3, the head of 2 x 5. Scores and values: 2 * 2 * L^2.
    assert forward_flops(ONE_LAYER, [4]) == 2 * 34 * 4 + 2 * 10 * 4 + 4 * 16
    assert forward_flops(ONE_LAYER, [4], num_logits=1) == 2 * 34 * 4 + 2 * 10 + 4 * 16
    assert forward_flops(ONE_LAYER, [4, 3]) == forward_flops(ONE_LAYER, [4]) + forward_flops(
        ONE_LAYER, [3]
    )
    assert forward_flops(ONE_LAYER, []) == 0
    # Two of three experts and the router, 3 matrices of 2 x 3 each and one of 2 x 3.
    experts = replace(ONE_LAYER, num_experts=3, experts_per_token=2)
    assert forward_flops(experts, [4]) == forward_flops(ONE_LAYER, [4]) + 2 * (18 + 6) * 4


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen2", "Llama"])
def test_is_what_torch_counts(architecture: str, tmp_path: Path) -> None:
    """torch counts the whole square of the attention, of which causality needs half."""
    model: Any = tiny_hf_folder(tmp_path, architecture)
    model.set_attn_implementation("eager")
    shape, length = model_shape(model.config), 40
    width = shape.num_heads * shape.head_dim
    unneeded = 2 * shape.num_layers * width * length**2
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=ids, use_cache=False).logits
    assert forward.get_total_flops() == forward_flops(shape, [length]) + unneeded
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_rollout_counts_segments_and_logits_of_sampled_tokens() -> None:
    turn = make_turn(num_tokens=3)  # one observation token
    twice = make_trajectory("g", 0, ((turn, turn), (turn,)))
    failed = make_trajectory("g", 1, ((turn,),), status=Status.FAILED_TOOL)
    group = TrajectoryGroup(
        group_id="g", prompt=make_prompt("g"), members=(twice,), failures=(failed,)
    )
    assert rollout_work(ONE_LAYER, [group]) == PassWork(
        name="rollout",
        origin=Origin.ON_POLICY,
        tokens=12,
        flops=forward_flops(ONE_LAYER, [8, 4], num_logits=9),
    )


def test_a_pass_by_origin() -> None:
    samples = [make_sample(mask=[1] * length) for length in (4, 3, 2)]
    origins = [Origin.ON_POLICY, Origin.REPLAY, Origin.REPLAY]
    own, replayed = policy_work(ONE_LAYER, "train", samples, origins)
    assert (own.origin, own.tokens, own.flops) == (origins[0], 4, 3 * forward_flops(ONE_LAYER, [4]))
    assert (replayed.tokens, replayed.flops) == (5, 3 * forward_flops(ONE_LAYER, [3, 2]))
    (_, replayed) = policy_work(ONE_LAYER, "current_logprobs", samples, origins)
    assert replayed.flops == forward_flops(ONE_LAYER, [3, 2])


def _pass(name: Any, origin: Origin, tokens: int, flops: float) -> PassWork:
    return PassWork(name=name, origin=origin, tokens=tokens, flops=flops)


def test_metrics_by_hand() -> None:
    own, replay = Origin.ON_POLICY, Origin.REPLAY
    passes = [
        _pass("rollout", own, 100, 30.0),
        _pass("old_logprobs", own, 80, 10.0),
        _pass("current_logprobs", replay, 20, 2.0),
        _pass("train", own, 80, 30.0),
        _pass("train", replay, 15, 5.0),
        _pass("train", own, 1, 1.0),
    ]
    expected = {
        "work/rollout_tokens": 100.0,
        "work/old_logprobs_tokens": 80.0,
        "work/ref_logprobs_tokens": 0.0,
        "work/current_logprobs_tokens": 20.0,
        "work/train_tokens": 96.0,
        "work/replay_tokens": 15.0,
        "work/train_flops": 36.0,
        "work/replay_flops": 7.0,
        "work/step_flops": 78.0,
        "work/replay_train_fraction": 5 / 36,
        "work/replay_step_fraction": 7 / 71,
    }
    assert work_metrics(passes) == pytest.approx(expected)


def test_a_step_without_work() -> None:
    metrics = work_metrics([])
    assert set(metrics.values()) == {0.0} and np.isfinite(list(metrics.values())).all()
