"""Planned memory against the live bytes of real training ranks: models of 56 million parameters.

Everything that a rank's CPU allocator hands out from the building of the policy to the end of its
second optimizer step counts (``testing.live_bytes``). The first step, which makes Adam's state, has
few tokens; the second has two micro-batches a rank, as long as they may be.
"""

import logging
from typing import Any

import pytest

from megatron_spear.cluster.planner.memory import stage_bytes
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.testing.ranks import run_ranks

logger = logging.getLogger(__name__)

TOKENS, MICRO_BATCHES = 256, 2
QWEN3 = ModelShape(
    family="qwen3", num_layers=8, hidden_size=512, ffn_size=1408, num_heads=8, num_groups=4,
    head_dim=64, vocab_size=32000, norm_eps=1e-6, rope_theta=1e4, qk_norm=True,
)  # fmt: skip
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "recompute full": (1, {"recompute": "full"}),
    "TP2+SP": (2, {"tensor_parallel": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_parallel": 2}),
    "DP2": (2, {}),
    "DP2, distributed": (2, {"distributed_optimizer": True}),
}
SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor_parallel": 2}),
    "PP2xVPP2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context_parallel": 2}),
    "recompute selective": (1, {"recompute": "selective"}),
}


def peaks(cases: list[dict[str, Any]]) -> list[int]:
    """This rank's most live bytes in each case."""
    from megatron_spear.policy import parallel

    found = []
    for settings in cases:
        policy = PolicySection(**settings, tokens_per_microbatch=TOKENS)
        ctx = parallel.initialize(policy, seed=0)
        found.append(_trained(policy, ctx))
        parallel.destroy(keep_world=True)
    return found


def _trained(section: PolicySection, ctx: Any) -> int:
    import torch

    from megatron_spear.policy.policy import MegatronPolicy
    from megatron_spear.testing.live_bytes import live_bytes
    from megatron_spear.testing.nll import WeightedNll

    with live_bytes() as live:
        policy = MegatronPolicy(QWEN3, section, section.optimizer, 2, ctx)
        with torch.no_grad():
            for parameter in policy._parameters():
                parameter.normal_(std=0.02)
        policy.reset_optimizer(section.optimizer, 2)
        loss = WeightedNll() if ctx.is_controller else None
        for length in (8, TOKENS // 2):
            packed = _packed(policy, length) if ctx.is_controller else None
            report = policy.train_step(packed, loss)
            assert report["skipped"] == 0.0
    return live.peak


def _packed(policy: Any, length: int) -> Any:
    from megatron_spear.data.packing import pack
    from megatron_spear.testing.tiny import random_samples

    count = 2 * MICRO_BATCHES * policy.ctx.data_size
    packed = pack(
        *random_samples(count, shortest=length, longest=length, vocab=1000),
        data_parallel=policy.ctx.data_size,
        tokens_per_microbatch=2 * length,
        pad_multiple=policy.pad_multiple,
        sequence_multiple=policy.sequence_multiple,
        mix_lengths=policy.mix_lengths,
        microbatch_multiple=policy.microbatch_multiple,
    )
    for batches in packed.micro_batches:
        assert [batch.num_tokens for batch in batches] == [2 * length] * MICRO_BATCHES
    return packed


def measured(cases: dict[str, tuple[int, dict[str, Any]]]) -> dict[str, list[int]]:
    """By case, every rank's peak; all cases of a world share its ranks."""
    found = {}
    for world in (1, 2):
        own = {name: settings for name, (size, settings) in cases.items() if size == world}
        ranks = run_ranks(peaks, world, list(own.values()), timeout_s=240)
        found |= dict(zip(own, map(list, zip(*ranks, strict=True)), strict=True))
    return found


def check(cases: dict[str, tuple[int, dict[str, Any]]]) -> None:
    """The whole to 10 %, and what is not states, the smaller part, to 10 % too."""
    for name, found in measured(cases).items():
        world, settings = cases[name]
        policy = PolicySection(**settings, tokens_per_microbatch=TOKENS)
        for rank, peak in enumerate(found):
            stage = rank * policy.pipeline_parallel // world
            own = stage_bytes(QWEN3, policy, world, stage, on_cpu=True, microbatches=MICRO_BATCHES)
            told = f"{name}, rank {rank}: {own.states / 1e6:.1f} + {own.activations / 1e6:.1f} MB "
            told += f"planned, {peak / 1e6:.1f} MB measured"
            logger.info("%s", told)
            assert own.total == pytest.approx(peak, rel=0.1), told
            assert own.activations == pytest.approx(peak - own.states, rel=0.1), told


def test_planned_memory_is_what_ranks_use() -> None:
    check(CASES)


@pytest.mark.slow
def test_planned_memory_of_further_layouts() -> None:
    check(SLOW)
