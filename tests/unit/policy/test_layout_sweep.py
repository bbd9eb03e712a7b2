"""Whatever the rules of layouts let through, Megatron builds: model, gradient buffers, optimizer.

A drawn part of all combinations of settings, each as one rank of a world that is not there. That
such layouts also train alike is for ``tests/distributed``.
"""

import dataclasses
import random
import traceback
from typing import Any

import pytest
import torch

from megatron_spear.config.layout import layout_problems
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.testing.ranks import run_ranks

DENSE = ModelShape(
    family="qwen3", num_layers=12, hidden_size=24, ffn_size=24, num_heads=12, num_groups=12,
    head_dim=4, vocab_size=50, norm_eps=1e-6, rope_theta=1e4, qk_norm=True, tied=True,
)  # fmt: skip
EXPERTS = dataclasses.replace(
    DENSE, family="qwen3_moe", tied=False, num_experts=12, experts_per_token=2
)
SHAPES = {"dense": DENSE, "experts": EXPERTS}
BUILT = 30


def drawn(draw: random.Random) -> tuple[int, dict[str, Any]]:
    """(ranks, ``policy.*``): any combination, possible or not."""
    parts = ("tensor", "pipeline", "expert", "context")
    switches = ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    layout: dict[str, Any] = {f"{part}_parallel": draw.choice((1, 2, 3, 4)) for part in parts}
    layout |= {name: draw.random() < 0.5 for name in ("sequence_parallel", *switches)}
    layout["virtual_pipeline"] = draw.choice((1, 2, 3))
    layout["recompute"] = draw.choice(("none", "selective", "full"))
    return draw.choice((1, 2, 3, 4, 6, 12)), layout


def possible(shape: ModelShape) -> list[tuple[int, dict[str, Any]]]:
    """``BUILT`` of those that the rules let through."""
    sizes = {"heads": shape.num_heads, "groups": shape.num_groups, "ffn": shape.ffn_size}
    layers, draw = {"layers": shape.num_layers}, random.Random(0)
    found: list[tuple[int, dict[str, Any]]] = []
    while len(found) < BUILT:
        ranks, layout = drawn(draw)
        policy = PolicySection(**layout)
        if not any(layout_problems(policy, ranks, sizes, layers, shape.num_experts)):
            found.append((ranks, layout))
    return found


def build(shape: ModelShape, jobs: list[tuple[int, dict[str, Any]]]) -> list[str]:
    """What went wrong with each job's last rank, empty if nothing did."""
    from megatron_spear.policy.policy import MegatronPolicy
    from megatron_spear.testing.fake_world import fake_rank

    told = []
    for ranks, layout in jobs:
        policy, optimizer = PolicySection(**layout), OptimizerSection()
        try:
            with fake_rank(policy, ranks - 1, ranks) as ctx, torch.device("cpu"):
                here = dataclasses.replace(ctx, device=torch.device("cpu"))
                made = MegatronPolicy(shape, policy, optimizer, 10, here)
                made.reset_optimizer(optimizer, 10)
            told.append("")
        except Exception:  # noqa: BLE001  (told, whatever it is)
            told.append(traceback.format_exc())
    return told


@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_not_refused_is_built(kind: str) -> None:
    chosen = possible(SHAPES[kind])
    (told,) = run_ranks(build, 1, SHAPES[kind], chosen, timeout_s=240)
    failed = {str(job): text for job, text in zip(chosen, told, strict=True) if text}
    assert not failed
