"""Whatever the rules of layouts let through, Megatron builds: model, gradient buffers, optimizer.

A drawn part of all combinations of settings, each as one rank of a world that is not there. That
such layouts also train alike is for ``tests/distributed``.
"""

import dataclasses
import itertools
import random
import traceback
from collections.abc import Iterator
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


def combinations() -> Iterator[tuple[int, dict[str, Any]]]:
    """(ranks, ``policy.*``), those that cannot work among them."""
    parts, switch = (1, 2, 3, 4), (False, True)
    for ranks in (1, 2, 3, 4, 6, 12):
        for numbers in itertools.product(parts, parts, parts, parts):
            names = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "expert_parallel")
            layout: dict[str, Any] = dict(zip(names, numbers, strict=True))
            for flags in itertools.product(switch, switch, switch, switch):
                yield (
                    ranks,
                    layout
                    | dict(
                        zip(
                            (
                                "sequence_parallel",
                                "distributed_optimizer",
                                "overlap_grad_reduce",
                                "overlap_param_gather",
                            ),
                            flags,
                            strict=True,
                        )
                    ),
                )


def possible(shape: ModelShape) -> list[tuple[int, dict[str, Any]]]:
    """Those that the rules let through, with each kind of recomputation in turn."""
    sizes = {"heads": shape.num_heads, "groups": shape.num_groups, "ffn": shape.ffn_size}
    found = [
        (ranks, layout)
        for ranks, layout in combinations()
        if not any(
            layout_problems(
                PolicySection(**layout), ranks, sizes, {"layers": shape.num_layers},
                shape.num_experts,
            )
        )
    ]  # fmt: skip
    random.Random(0).shuffle(found)
    modes = itertools.cycle(("none", "selective", "full"))
    return [(ranks, layout | {"recompute": next(modes)}) for ranks, layout in found]


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
    jobs = possible(SHAPES[kind])
    assert len(jobs) > 2 * BUILT
    chosen = jobs[:BUILT]
    (told,) = run_ranks(build, 1, SHAPES[kind], chosen, timeout_s=240)
    failed = {str(job): text for job, text in zip(chosen, told, strict=True) if text}
    assert not failed
