"""The estimate of memory: states by hand, activations counted on a model that runs.

Megatron's real model runs on the CPU, in a process that stands for a rank of a world that is not
there. A stand-in for the attention kernel keeps what torch's flash kernel keeps.
"""

import dataclasses
from typing import Any

import pytest
import torch
from megatron_spear.policy.memory import fullest_rank, kept_a_token

from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import random_samples

TOKENS, LAYERS = 64, 3
LLAMA = ModelShape(
    family="llama", num_layers=LAYERS, hidden_size=256, ffn_size=640, num_heads=8, num_groups=4,
    head_dim=48, vocab_size=200, norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True)
EXPERTS = dataclasses.replace(
    QWEN3, family="qwen3_moe", ffn_size=128, num_experts=8, experts_per_token=3
)
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
TP4 = {"tensor_parallel": 4, "sequence_parallel": True}
CASES: dict[str, tuple[ModelShape, dict[str, Any]]] = {
    "norms on neither": (LLAMA, {}),
    "norms on query and key": (QWEN3, {}),
    "experts": (EXPERTS, {}),
    "tensor parallel": (LLAMA, TP2),
    "one group a rank": (LLAMA, TP4),
    "one group a rank, norms": (QWEN3, TP4),
}
MODES = ("none", "selective", "full")


class FlashKernel(torch.autograd.Function):  # type: ignore[misc]
    """Keeps what torch's kernel for packed sequences keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        out, logsumexp = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def kept_bytes(jobs: list[tuple[ModelShape, dict[str, Any]]]) -> list[tuple[int, int]]:
    """Of each (shape, settings): bytes that the forward pass keeps for the backward pass, and most
    of them at any time of both."""
    import torch.nn.attention.varlen as varlen

    from megatron_spear.data.packing import pack
    from megatron_spear.policy.model import PackedModel
    from megatron_spear.testing.fake_world import fake_rank

    varlen.varlen_attn = lambda q, k, v, *args, **kwargs: FlashKernel.apply(q, k, v)
    found = []
    for shape, settings in jobs:
        policy = PolicySection(**settings)
        with fake_rank(policy, 0, policy.tensor_parallel) as ctx, torch.device("cpu"):
            here = dataclasses.replace(ctx, device=torch.device("cpu"))
            model = PackedModel(shape, policy, here)
            model.packed_attention = True
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            samples = random_samples(4, shortest=16, longest=16, vocab=shape.vocab_size)
            packed = pack(*samples, data_parallel=1, tokens_per_microbatch=TOKENS)
            found.append(_counted(model, packed.micro_batches[0][0]))
    return found


def _counted(model: torch.nn.Module, batch: Any) -> tuple[int, int]:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, list[int]] = {}  # by storage: its size, how often it is kept
    most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            storage = tensor.untyped_storage()
            self.key = storage.data_ptr()
            if self.key not in weights:
                kept.setdefault(self.key, [storage.nbytes(), 0])[1] += 1
            most = max(most, sum(size for size, _ in kept.values()))

        def __del__(self) -> None:
            if self.key in kept:
                kept[self.key][1] -= 1
                if kept[self.key][1] == 0:
                    del kept[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        logits = model(batch)
        before = sum(size for size, _ in kept.values())
        most = before
        logits.sum().backward()
    return before, most


@pytest.fixture(scope="module")
def counted() -> dict[tuple[str, str], tuple[int, int]]:
    jobs = {
        (name, mode): (shape, settings | {"recompute": mode})
        for name, (shape, settings) in CASES.items()
        for mode in MODES
    }
    (found,) = run_ranks(kept_bytes, 1, list(jobs.values()), timeout_s=120)
    return dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_activations_are_what_autograd_keeps(
    name: str, mode: str, counted: dict[tuple[str, str], tuple[int, int]]
) -> None:
    """In float32 twice the bytes of bf16, to 3 %.

    What is there at the end of the forward pass; the loss, which keeps the logits, comes after it.
    With full recomputation also the most in the backward pass, when the end's are gone.
    """
    shape, settings = CASES[name]
    policy = PolicySection(**settings, recompute=mode, tokens_per_microbatch=TOKENS)
    whole = fullest_rank(shape, policy, policy.tensor_parallel).activations
    end = 2 * 2 * TOKENS * shape.hidden_size // policy.tensor_parallel
    logits = 2 * 2 * TOKENS * shape.vocab_size // policy.tensor_parallel
    before, most = counted[name, mode]
    if mode != "full":
        assert before == pytest.approx(2 * (whole - logits), rel=0.03)
    else:
        assert most == pytest.approx(2 * (whole - logits - end), rel=0.03)
        inputs = 2 * TOKENS * LAYERS * kept_a_token(shape, policy)
        assert before == pytest.approx(2 * (inputs + end), rel=0.03)


def test_what_selective_recomputation_saves() -> None:
    """Of Llama the groups, twice; with one group a rank the heads too; of Qwen3 nothing."""
    saved = {
        name: kept_a_token(shape, PolicySection(**settings))
        - kept_a_token(shape, PolicySection(**settings, recompute="selective"))
        for name, (shape, settings) in CASES.items()
    }
    assert saved["norms on neither"] == 4 * 48
    assert saved["one group a rank"] == (8 + 4) * 48 // 4
    assert saved["norms on query and key"] == saved["experts"] == 0


def test_states_of_a_small_model_by_hand() -> None:
    """Hidden 8, 4 heads in 2 groups of 2, ffn 16, 50 words, 4 layers; TP 2, PP 2 on 12 ranks."""
    shape = ModelShape(
        family="llama", num_layers=4, hidden_size=8, ffn_size=16, num_heads=4, num_groups=2,
        head_dim=2, vocab_size=50, norm_eps=1e-6, rope_theta=1e4,
    )  # fmt: skip
    policy = PolicySection(tensor_parallel=2, pipeline_parallel=2, tokens_per_microbatch=10)
    qkv, proj, mlp, norms = 8 * 16 // 2, 8 * 8 // 2, 3 * 8 * 16 // 2, 2 * 8
    stage = 2 * (qkv + proj + mlp + norms) + 25 * 8  # the first: an embedding, but no final norm
    needs = fullest_rank(shape, policy, 12)
    assert needs.states == 18 * stage
    layer = (4 * 8 + 3 * (4 + 2) * 2 + 3 * 16) // 2
    assert needs.activations == 2 * 2 * 2 * 10 * layer  # two micro-batches of two layers
    long = policy.model_copy(update={"context_parallel": 2, "tokens_per_microbatch": 20})
    gathered = (2 * 2 + 1) * 2 * 2 // 2  # half of the tokens, and others' keys and values
    assert fullest_rank(shape, long, 12).activations == 2 * 2 * 2 * 10 * (layer + gathered)
    split = policy.model_copy(update={"distributed_optimizer": True})
    assert fullest_rank(shape, split, 12).states == (6 + 12 // 3) * stage
    again = policy.model_copy(update={"recompute": "full"})
    last = 2 * 4 + (layer - 4) + (8 + 2 * 25)  # the first, of twice the inputs, has no logits
    assert fullest_rank(shape, again, 12).activations == 2 * 10 * last
    one = policy.model_copy(update={"pipeline_parallel": 1})
    assert fullest_rank(shape, one, 12).activations == 2 * 10 * (4 * layer + 8 + 2 * 25)


def test_an_experts_states_are_split_over_the_ranks_that_hold_it() -> None:
    """8 ranks, TP 2, EP 4: 4 replicas of the rest, and each expert on 2 ranks."""
    policy = PolicySection(**TP2, expert_parallel=4, distributed_optimizer=True)
    plain = policy.model_copy(update={"distributed_optimizer": False})
    experts = LAYERS * 8 // 4 * 3 * 256 * 128
    whole = fullest_rank(EXPERTS, plain, 8).states
    rest = whole - 18 * experts
    assert fullest_rank(EXPERTS, policy, 8).states == (6 + 12 // 2) * experts + rest * 9 // 18
