"""The policy on a GPU: equal to transformers in float32, close in bf16, exact after a load."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.logprobs import token_logprobs
from megatron_spear.algorithms.policy_loss import NllLoss
from megatron_spear.config.precision import CAPABILITY, capability_problem
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.data.zigzag import part_of, zigzag_order
from megatron_spear.policy.attention import PackedAttention, Rotary, packed_layout
from megatron_spear.policy.context_attention import attend_laid_out, attend_packed, context_layout
from megatron_spear.policy.implementation import cuda_capability, has_transformer_engine
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.policy.weights import parameters_of
from megatron_spear.testing.tiny import hf_logprobs, random_samples, tiny_hf_folder


def _policy(path: Path, ctx: ParallelContext, precision: str) -> MegatronPolicy:
    section = PolicySection(precision=precision)
    return MegatronPolicy.from_hf(path, section, OptimizerSection(lr=1e-3), 10, ctx)


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen2", "Llama"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("bf16", 0.1)])
def test_equals_transformers(
    architecture: str, precision: str, bound: float, tmp_path: Path, ctx: ParallelContext
) -> None:
    model = tiny_hf_folder(tmp_path, architecture)
    policy = _policy(tmp_path, ctx, precision)
    assert policy.mix_lengths == (precision == "bf16")
    packed = pack(*random_samples(), tokens_per_microbatch=200, mix_lengths=policy.mix_lengths)
    got = policy.logprobs(packed, 0.8)
    samples, weights, _ = random_samples()
    for sample, values in zip(samples, got, strict=True):
        want = hf_logprobs(model, sample.token_ids, 0.8).detach()
        torch.testing.assert_close(torch.from_numpy(values), want, rtol=0, atol=bound)
    loss = sum(
        -(hf_logprobs(model, s.token_ids) * torch.from_numpy(w)).sum()
        for s, w in zip(samples, weights, strict=True)
    )
    loss.backward()
    policy.compute_gradient([b.to(ctx.device) for b in packed.micro_batches[0]], NllLoss())
    ours = parameters_of(policy._chunks[0])
    for name, theirs in (
        ("decoder.layers.0.mlp.linear_fc2.weight", model.model.layers[0].mlp.down_proj),
        ("decoder.layers.1.input_layernorm.weight", model.model.layers[1].input_layernorm),
    ):
        want = theirs.weight.grad
        error = (ours[name].main_grad.float().cpu() - want).norm() / want.norm()
        assert error < (1e-4 if precision == "fp32" else 0.05), name


def _rotary(ctx: ParallelContext) -> Rotary:
    rotary = Rotary.__new__(Rotary)
    rotary.frequencies = 10_000 ** -(torch.arange(0, 64, 2, device=ctx.device) / 64)
    rotary.dtype, rotary._cos, rotary._sin = torch.bfloat16, torch.empty(0), torch.empty(0)
    return rotary


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_attention_equals_the_laid_out_one(kv_heads: int, ctx: ParallelContext) -> None:
    """Both in bf16, forward and gradient, on sequences of 1 to 300 tokens."""
    torch.manual_seed(0)
    lengths = torch.tensor([1, 300, 7, 64], device=ctx.device)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rotary = _rotary(ctx)
    tensors = [
        torch.randn(372, 1, heads, 64, device=ctx.device, dtype=torch.bfloat16)
        for heads in (4, kv_heads, kv_heads)
    ]
    seen = []
    for packed in (True, False):
        inputs = [t.clone().requires_grad_() for t in tensors]
        layout = packed_layout(cu_seqlens, 300, rotary, packed=packed)
        out = PackedAttention(None, 1)(*inputs, None, packed_seq_params=layout)
        out.backward(torch.linspace(-1, 1, out.numel(), device=ctx.device).view_as(out).bfloat16())
        seen.append([out.detach(), *(t.grad for t in inputs)])
    for one, other in zip(*seen, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() / other.norm() < 0.01


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_context_parallel_attention_equals_the_laid_out_one(
    rank: int, kv_heads: int, ctx: ParallelContext
) -> None:
    """One of two ranks with keys and values as if gathered, in bf16, forward and gradient.

    The flash kernel's causal mask has to mean that the last query of a chunk sees its last key.
    """
    torch.manual_seed(0)
    packed = pack(
        *random_samples(6, shortest=1, longest=300), tokens_per_microbatch=4000, sequence_multiple=4
    )
    whole = packed.micro_batches[0][0].to(ctx.device)
    order = zigzag_order(whole.cu_seqlens, 2)
    part, rotary = part_of(whole, rank, 2), _rotary(ctx)
    draw = {"device": ctx.device, "dtype": torch.bfloat16}
    query = torch.randn(part.num_tokens, 4, 64, **draw)
    both = torch.randn(order.numel(), 2 * kv_heads, 64, **draw)
    seen = []
    for attend in (attend_packed, attend_laid_out):
        layout = context_layout(part, rotary, rank, 2, None, packed=attend is attend_packed)
        inputs = [t.clone().requires_grad_() for t in (query, both)]
        out = attend(*inputs, layout, None)
        out.backward(torch.linspace(-1, 1, out.numel(), device=ctx.device).view_as(out).bfloat16())
        seen.append([out.detach(), *(t.grad for t in inputs)])
    for one, other in zip(*seen, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() / other.norm() < 0.01


def test_token_logprobs_equal_the_plain_ones(ctx: ParallelContext) -> None:
    torch.manual_seed(0)
    logits = torch.randn(700, 5000, device=ctx.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 5000, (700,), device=ctx.device)
    logprobs, entropy = token_logprobs(logits, labels, temperature=0.7, with_entropy=True)
    logprobs.sum().backward()
    plain = logits.detach().double().requires_grad_()
    table = (plain / 0.7).log_softmax(-1)
    table.gather(1, labels[:, None]).sum().backward()
    expected = table.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)
    assert entropy is not None
    expected = -(table.exp() * table).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), plain.grad, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_and_loaded_is_the_same(precision: str, tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path)
    policy = _policy(tmp_path, ctx, precision)
    packed = pack(*random_samples(), tokens_per_microbatch=200)
    policy.train_step(packed, NllLoss())
    policy.save(tmp_path / "checkpoint")
    expected = [policy.train_step(packed, NllLoss())["loss/total"] for _ in range(3)]
    other = _policy(tmp_path, ctx, precision)
    other.load(tmp_path / "checkpoint")
    found = [other.train_step(packed, NllLoss())["loss/total"] for _ in range(3)]
    assert found == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 1e-3)
    assert np.isfinite(found).all() and found[-1] < expected[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_optimizer_on_the_cpu_gives_the_same_weights_for_less_memory(
    precision: str, tmp_path: Path, ctx: ParallelContext
) -> None:
    """A share of 0, 0.5 and 1, in a model whose states outweigh its activations."""
    tiny_hf_folder(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    packed = pack(*random_samples(), tokens_per_microbatch=200)
    weights, peaks = [], []
    for share in (0.0, 0.5, 1.0):
        section = PolicySection(
            precision=precision, distributed_optimizer=True, optimizer_offload=share
        )
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        policy = MegatronPolicy.from_hf(tmp_path, section, OptimizerSection(lr=1e-3), 10, ctx)
        for _ in range(3):
            policy.train_step(packed, NllLoss())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        weights.append({n: t.float().cpu() for n, t in policy.export_weights() if t is not None})
        del policy
        gc.collect()
    rounding = {"rtol": 0.0, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.01, "atol": 1e-3}
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, msg=name, **rounding)
    assert peaks[0] > peaks[1] > peaks[2]


def test_a_save_beside_the_training_is_of_its_beginning(
    tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path)
    policy = _policy(tmp_path, ctx, "bf16")
    packed = pack(*random_samples(), tokens_per_microbatch=200)
    policy.train_step(packed, NllLoss())
    policy.save(tmp_path / "waited-for")
    pending = policy.begin_save(tmp_path / "beside")
    for _ in range(3):
        policy.train_step(packed, NllLoss())
    pending.finish()
    files = sorted(path.name for path in (tmp_path / "beside").glob("*.distcp"))
    assert files
    for name in files:
        one, other = (tmp_path / folder / name for folder in ("waited-for", "beside"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("recipe", CAPABILITY)
def test_fp8_is_near_float32_and_trains(recipe: str, tmp_path: Path, ctx: ParallelContext) -> None:
    """The audit has looked at every linear when ``from_hf`` returns."""
    if not has_transformer_engine():
        pytest.skip("TransformerEngine is not installed")
    if problem := capability_problem(recipe, cuda_capability()):
        pytest.skip(problem)
    tiny_hf_folder(tmp_path, num_hidden_layers=4)
    ends = int(recipe != "delayed")
    fp8 = {"recipe": recipe, "bf16_layers_at_start": ends, "bf16_layers_at_end": ends}
    section = PolicySection(precision="bf16", fp8=fp8)
    policy = MegatronPolicy.from_hf(tmp_path, section, OptimizerSection(lr=1e-3), 10, ctx)
    packed = pack(*random_samples(), tokens_per_microbatch=200, pad_multiple=policy.pad_multiple)
    exact = np.concatenate(_policy(tmp_path, ctx, "fp32").logprobs(packed, 1.0))
    error = np.abs(np.concatenate(policy.logprobs(packed, 1.0)) - exact)
    assert 1e-4 < error.mean() < 0.1
    losses = [policy.train_step(packed, NllLoss())["loss/total"] for _ in range(4)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
