"""What a rank holds all the time, by hand."""

from typing import Any

import pytest

from megatron_spear.cluster.planner.states import states
from megatron_spear.config.schema import Fp8Section, PolicySection
from megatron_spear.conversion.shape import ModelShape

SHAPE = ModelShape(
    family="llama", num_layers=4, hidden_size=8, ffn_size=16, num_heads=4, num_groups=2,
    head_dim=2, vocab_size=50, norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip
EXPERTS = ModelShape(
    family="qwen3_moe", num_layers=3, hidden_size=256, ffn_size=128, num_heads=8, num_groups=4,
    head_dim=48, vocab_size=200, norm_eps=1e-6, rope_theta=1e4, qk_norm=True, num_experts=8,
    experts_per_token=3,
)  # fmt: skip
# Hidden 8, 4 heads in 2 groups of 2, ffn 16, 50 words; TP 2, PP 2.
LINEARS = 2 * (8 * 16 // 2 + 8 * 8 // 2 + 3 * 8 * 16 // 2)
STAGE = LINEARS + 2 * 2 * 8 + 25 * 8  # the first: an embedding, but no final norm


def policy(**settings: Any) -> PolicySection:
    both = {"tensor_parallel": 2, "pipeline_parallel": 2, "precision": "bf16"}
    return PolicySection(**both | settings)


def test_bytes_a_parameter() -> None:
    plain = states(SHAPE, policy(), 12, 0)
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * STAGE, 4 * STAGE, 12 * STAGE)
    last = states(SHAPE, policy(), 12, 1)
    assert last.total == plain.total + 18 * 8  # the output layer and the final norm
    single = states(SHAPE, policy(precision="fp32"), 12, 0)
    assert (single.weights, single.optimizer) == (4 * STAGE, 8 * STAGE)


def test_a_distributed_optimizer_splits_its_state_over_replicas() -> None:
    """12 ranks, 3 replicas; two context parallel ranks are as good as two replicas."""
    assert states(SHAPE, policy(distributed_optimizer=True), 12, 0).optimizer == 4 * STAGE
    both = policy(distributed_optimizer=True, context_parallel=3)
    assert states(SHAPE, both, 12, 0).optimizer == 4 * STAGE


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_offload_moves_a_share_to_the_host(share: float) -> None:
    moved = states(SHAPE, policy(distributed_optimizer=True, optimizer_offload=share), 12, 0)
    assert moved.optimizer == 4 * (1 - share) * STAGE
    assert moved.host == round(16 * share * STAGE / 3)


def test_fp8_weights() -> None:
    """Kept beside bf16 ones, or instead of them, in the layers that are in FP8."""
    bf16 = states(SHAPE, policy(), 12, 0).weights
    beside = policy(fp8=Fp8Section(recipe="tensorwise", bf16_layers_at_end=0))
    assert states(SHAPE, beside, 12, 0).weights == bf16 + 2 * LINEARS // 2  # the second of two
    assert states(SHAPE, beside, 12, 1).weights == states(SHAPE, policy(), 12, 1).weights + (
        2 * LINEARS
    )
    instead = policy(fp8=Fp8Section(recipe="tensorwise", parameters=True))
    assert states(SHAPE, instead, 12, 0).weights == bf16


def test_an_experts_states_are_split_over_the_ranks_that_hold_it() -> None:
    """8 ranks, TP 2, EP 4: 4 replicas of the rest, and each expert on 2 ranks."""
    both = {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 4}
    plain = PolicySection(**both, precision="bf16")
    split = plain.model_copy(update={"distributed_optimizer": True})
    experts = 3 * 8 // 4 * 3 * 256 * 128
    whole = states(EXPERTS, plain, 8, 0).total
    rest = whole - 18 * experts
    expected = (6 + 12 // 2) * experts + rest * 9 // 18
    assert states(EXPERTS, split, 8, 0).total == expected
