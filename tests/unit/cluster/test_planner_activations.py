"""What a rank keeps of a micro-batch, counted on a model that runs.

Megatron's real model runs on the CPU, in a process that stands for a rank of a world that is not
there. A stand-in for the attention kernel keeps what torch's flash kernel keeps.
"""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_spear.cluster.planner.activations import (
    Activations,
    activations,
    kept_a_token,
    units_in_flight,
)
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
    """To 3 %.

    What is there at the end of the forward pass; the loss, which keeps the logits, comes after it.
    With full recomputation also the most in the backward pass, when the end's are gone.
    """
    shape, settings = CASES[name]
    policy = PolicySection(**settings, recompute=mode, tokens_per_microbatch=TOKENS)
    kept = activations(shape, policy, 0, packed=True).kept
    before, most = counted[name, mode]
    assert before == pytest.approx(kept, rel=0.03)
    if mode == "full":
        plain = policy.model_copy(update={"recompute": "none"})
        end = 2 * shape.hidden_size // policy.tensor_parallel
        layer = kept_a_token(shape, plain) - kept_a_token(shape, policy)
        assert most == pytest.approx(kept + 4 * TOKENS * (layer - end), rel=0.03)


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


SMALL = ModelShape(
    family="llama", num_layers=4, hidden_size=8, ffn_size=16, num_heads=4, num_groups=2,
    head_dim=2, vocab_size=50, norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip


def of(stage: int = 0, *, packed: bool = True, **settings: Any) -> Activations:
    """Of a stage in bf16, 10 tokens a micro-batch unless it says so."""
    section = {"precision": "bf16", "tokens_per_microbatch": 10} | settings
    return activations(SMALL, PolicySection(**section), stage, packed=packed)


def test_a_small_models_stages_by_hand() -> None:
    """Hidden 8, 4 heads in 2 groups of 2, ffn 16, 50 words, 4 layers; TP 2, PP 2."""
    both = {"tensor_parallel": 2, "pipeline_parallel": 2}
    split = (3 * (4 + 2) * 2 + 3 * 16) // 2  # attention and MLP
    whole, parts = 4 * 8 + split, 4 * 8 // 2 + split  # without and with sequence parallelism
    assert of(**both).kept == 2 * 2 * 10 * (2 * whole + 8)  # two micro-batches, sent on
    assert of(1, **both).kept == 2 * 10 * (2 * whole + 2 * 8)
    assert of(**both, sequence_parallel=True).kept == 2 * 2 * 10 * (2 * parts + 4)
    long = both | {"context_parallel": 2, "tokens_per_microbatch": 20}
    gathered = (2 * 2 + 1) * 2 * 2 // 2  # half of the tokens, and others' keys and values
    assert of(**long).kept == 2 * 2 * 10 * (2 * (whole + gathered) + 8)
    assert of(**both, recompute="full").kept == 2 * 2 * 10 * (2 * 8 + 8)
    assert of(**both, precision="fp32").kept == 2 * of(**both).kept


def test_the_worst_moment_by_hand() -> None:
    """Of 10 tokens the logits twice; of one the output layer's gradient; elsewhere a layer."""
    table, layer = 2 * 50 * 8, 2 * 10 * (4 * 16 + 2 * 8)
    one = of()
    assert (one.binds, one.work, one.forward) == ("logits", 2 * 2 * 10 * 50, layer)
    short = of(tokens_per_microbatch=1)
    assert (short.binds, short.work) == ("logits", 2 * 50 + table + 2 * 8)
    first = of(pipeline_parallel=2)
    assert (first.binds, first.work) == ("a layer's backward pass", layer)
    again = kept_a_token(SMALL, PolicySection()) - 8
    assert of(recompute="full").work == layer + 2 * 10 * again
    # torch's own log-probs work on pieces in float32, here as large as the logits
    assert of(packed=False).work == 2 * one.work


def test_the_embeddings_gradient_comes_when_a_micro_batch_is_gone() -> None:
    words = dataclasses.replace(SMALL, vocab_size=5000)
    policy = PolicySection(pipeline_parallel=2, precision="bf16", tokens_per_microbatch=10)
    found = activations(words, policy, 0, packed=True)
    assert found.binds == "the embedding's gradient"
    assert found.total == 2 * 5000 * 8 + 2 * 10 * 8 + found.kept // 2


@pytest.mark.parametrize(
    ("pipeline", "pieces", "stage", "microbatches", "units"),
    [(4, 1, 0, None, 4), (4, 1, 3, None, 1), (4, 1, 0, 2, 2), (4, 2, 0, None, 11),
     (4, 2, 3, None, 5), (4, 2, 0, 4, 8)],
)  # fmt: skip
def test_micro_batches_in_flight(
    pipeline: int, pieces: int, stage: int, microbatches: int | None, units: int
) -> None:
    policy = PolicySection(pipeline_parallel=pipeline, virtual_pipeline=pieces)
    assert units_in_flight(policy, stage, microbatches) == units


def test_tokens_laid_out_keep_what_the_kernel_reads() -> None:
    """Query, key, value and result once more in rows; norms keep what they read too."""
    heads, groups = 8 * 48, 4 * 48
    rest = 4 * 256 + 3 * 640 + heads
    llama = kept_a_token(LLAMA, PolicySection(), packed=False)
    assert llama == rest + heads + heads + 2 * groups
    qwen3 = kept_a_token(QWEN3, PolicySection(), packed=False)
    assert qwen3 == llama + 2 * heads + 2 * groups
    both = PolicySection(context_parallel=2)
    assert kept_a_token(LLAMA, both, packed=False) == llama + 2 * groups
