"""Planned memory against the live bytes of real training ranks: models of 56 million parameters.

Everything that a rank's CPU allocator hands out from the building of the policy to the end of its
second optimizer step counts (``testing.live_bytes``). The first step, which makes Adam's state, has
few tokens; the second has two micro-batches a rank, as long as they may be.
"""

from typing import Any

import pytest

from megatron_spear.cluster.planner.activations import activations
from megatron_spear.cluster.planner.states import states
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.testing.ranks import run_ranks

TOKENS, MICRO_BATCHES = 256, 2
QWEN3 = ModelShape(
    family="qwen3", num_layers=8, hidden_size=512, ffn_size=1408, num_heads=8, num_groups=4,
    head_dim=64, vocab_size=32000, norm_eps=1e-6, rope_theta=1e4, qk_norm=True,
)  # fmt: skip
CASES: dict[str, tuple[int, ModelShape, dict[str, Any]]] = {
    "1 rank": (1, QWEN3, {}),
    "recompute full": (1, QWEN3, {"recompute": "full"}),
    "TP2": (2, QWEN3, {"tensor_parallel": 2}),
    "TP2+SP": (2, QWEN3, {"tensor_parallel": 2, "sequence_parallel": True}),
    "PP2": (2, QWEN3, {"pipeline_parallel": 2}),
    "PP2xVPP2": (2, QWEN3, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "CP2": (2, QWEN3, {"context_parallel": 2}),
    "DP2": (2, QWEN3, {}),
    "DP2, distributed": (2, QWEN3, {"distributed_optimizer": True}),
}
TOLERANCE = 0.1


def peaks(cases: list[tuple[ModelShape, dict[str, Any]]]) -> list[int]:
    """This rank's most live bytes in each case."""
    from megatron_spear.policy import parallel

    found = []
    for shape, settings in cases:
        policy = PolicySection(**settings, tokens_per_microbatch=TOKENS)
        ctx = parallel.initialize(policy, seed=0)
        found.append(_trained(shape, policy, ctx))
        parallel.destroy(keep_world=True)
    return found


def _trained(shape: ModelShape, section: PolicySection, ctx: Any) -> int:
    import torch

    from megatron_spear.policy.policy import MegatronPolicy
    from megatron_spear.testing.live_bytes import live_bytes
    from megatron_spear.testing.nll import WeightedNll

    with live_bytes() as live:
        policy = MegatronPolicy(shape, section, section.optimizer, 2, ctx)
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


@pytest.fixture(scope="module")
def measured() -> dict[str, list[int]]:
    """By case, every rank's peak; all cases of a world share its ranks."""
    found = {}
    for world in (1, 2):
        own = {name: case[1:] for name, case in CASES.items() if case[0] == world}
        ranks = run_ranks(peaks, world, list(own.values()), timeout_s=240)
        found |= dict(zip(own, map(list, zip(*ranks, strict=True)), strict=True))
    return found


def planned(name: str, rank: int) -> int:
    """What the planner says of the rank's peak."""
    world, shape, settings = CASES[name]
    policy = PolicySection(**settings, tokens_per_microbatch=TOKENS)
    stage = rank * policy.pipeline_parallel // world
    lasting = states(shape, policy, world, stage).total
    return lasting + activations(shape, policy, stage, packed=False, microbatches=2).total


@pytest.mark.parametrize("name", CASES)
def test_planned_memory_is_what_ranks_use(name: str, measured: dict[str, list[int]]) -> None:
    for rank, peak in enumerate(measured[name]):
        assert planned(name, rank) == pytest.approx(peak, rel=TOLERANCE)
