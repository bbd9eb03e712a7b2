"""The policy on one GPU: numerics, log-probs, training steps, FP8, checkpoints. About 5 minutes.

    python tools/benchmarks/gpu.py                 every part
    python tools/benchmarks/gpu.py --only step     of numerics, logprobs, step, checkpoint, fp8

The model of ``step`` and ``checkpoint`` has Qwen2.5-1.5B's shape and random weights; sequences have
log-normal lengths. MFU counts the model's own operations (matrix products of every token, causal
attention; backward twice the forward) against the chip's dense bf16 peak, and in
FP8 against its dense FP8 peak too (attention and output layer are not in FP8). ``fp8`` goes through
the recipes that the chip has, where TransformerEngine is installed, with no layer left in bf16.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_spear.algorithms.logprobs import token_logprobs
from megatron_spear.algorithms.policy_loss import NllLoss
from megatron_spear.config.precision import CAPABILITY, capability_problem
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import PackedStep, pack
from megatron_spear.policy import parallel
from megatron_spear.policy.implementation import (
    choose,
    cuda_capability,
    has_transformer_engine,
)
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.policy.weights import parameters_of
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder
from megatron_spear.types import Origin

Row = tuple[str, str]
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second, by chip (NVIDIA's data sheets)."""
PEAK_FP8 = {"H100": 1979e12, "H200": 1979e12}
"""The same in FP8."""
QWEN_1_5B = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
}
GIB = 2**30


def numerics(folder: Path, ctx: ParallelContext) -> Iterator[Row]:
    """bf16 against float32 on the same weights: log-probs and the gradient's direction."""
    packed = _medium(folder)
    found = {}
    for precision in ("fp32", "bf16"):
        policy = _policy(folder, ctx, precision)
        logprobs = np.concatenate(policy.logprobs(packed, 1.0))
        policy.compute_gradient(_on(ctx, packed), NllLoss())
        named = sorted(parameters_of(policy._chunks[0]).items())
        gradient = torch.cat([p.main_grad.flatten().double() for _, p in named])
        found[precision] = logprobs, gradient.cpu()
    (exact, full), (rounded, half) = found["fp32"], found["bf16"]
    gap = np.abs(exact - rounded)
    yield "bf16 against fp32: log-prob gap, mean and largest", f"{gap.mean():.1e}, {gap.max():.1e}"
    cosine = torch.dot(full, half) / (full.norm() * half.norm())
    yield "bf16 against fp32: cosine of the gradients", f"{cosine.item():.6f}"


def logprobs(folder: Path, ctx: ParallelContext) -> Iterator[Row]:
    """Log-probs and entropy of 4,096 tokens over 152k words, forward and backward."""
    torch.manual_seed(0)
    labels = torch.randint(0, 151_936, (4096,), device=ctx.device)
    logits = torch.randn(4096, 151_936, device=ctx.device, dtype=torch.bfloat16)

    def ours(x: torch.Tensor) -> torch.Tensor:
        values, entropy = token_logprobs(x, labels, with_entropy=True)
        assert entropy is not None
        return values.sum()

    def naive(x: torch.Tensor) -> torch.Tensor:
        table = x.float().log_softmax(-1)
        with torch.no_grad():
            (table.exp() * table).sum(-1)
        return table.gather(1, labels[:, None]).sum()

    seen = {}
    for name, function in (("naive", naive), ("ours", ours)):

        def run(function: Callable[[torch.Tensor], torch.Tensor] = function) -> None:
            function(logits.detach().requires_grad_()).backward()

        seen[name] = _measured(run, rounds=5)
    (slow, much), (fast, little) = seen["naive"], seen["ours"]
    yield "log-probs and entropy, 4,096 x 152k bf16: time", f"{fast * 1e3:.1f} ms"
    yield "  against log_softmax + gather + entropy", f"{fast / slow:.2f}x of {slow * 1e3:.1f} ms"
    yield "  peak memory beside the logits", f"{little / much:.2f}x of {much / GIB:.1f} GiB"


def step(folder: Path, ctx: ParallelContext) -> Iterator[Row]:
    """Training and log-prob passes of a 1.5B model in bf16."""
    policy, packed, lengths = _large(folder, ctx)
    operations = _forward_operations(lengths)
    tokens = sum(lengths)
    seconds, _ = _measured(lambda: policy.train_step(packed, NllLoss()), rounds=5)
    peak = PEAK_BF16.get(_chip(), math.nan)
    yield "1.5B bf16, training step", f"{seconds:.2f} s for {tokens:,} tokens in {_micro(packed)}"
    yield "  tokens a second", f"{tokens / seconds:,.0f}"
    yield "  MFU", f"{3 * operations / seconds / peak:.1%}"
    yield "  peak memory", f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB"
    seconds, _ = _measured(lambda: policy.logprobs(packed, 1.0), rounds=5)
    yield "1.5B bf16, log-probs without gradient", f"{tokens / seconds:,.0f} tokens/s"
    yield "  MFU", f"{operations / seconds / peak:.1%}"


def checkpoint(folder: Path, ctx: ParallelContext) -> Iterator[Row]:
    """A distributed checkpoint of the 1.5B model with its optimizer, there and back."""
    policy, packed, _ = _large(folder, ctx)
    policy.train_step(packed, NllLoss())
    before = policy.logprobs(packed, 1.0)
    target = folder / "checkpoint"
    started = time.perf_counter()
    policy.save(target)
    saved = time.perf_counter()
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    policy.train_step(packed, NllLoss())
    loading = time.perf_counter()
    policy.load(target)
    loaded = time.perf_counter()
    same = all((a == b).all() for a, b in zip(before, policy.logprobs(packed, 1.0), strict=True))
    yield "checkpoint of model and optimizer", f"{size / GIB:.1f} GiB"
    yield "  saved", f"{saved - started:.1f} s ({size / GIB / (saved - started):.2f} GiB/s)"
    yield "  loaded", f"{loaded - loading:.1f} s ({size / GIB / (loaded - loading):.2f} GiB/s)"
    yield "  log-probs after loading", "the same bits" if same else "DIFFER"


def fp8(folder: Path, ctx: ParallelContext) -> Iterator[Row]:
    """Every recipe of the chip: log-probs against float32, then steps of the 1.5B model."""
    _policies.clear()
    for recipe in CAPABILITY:
        if reason := _why_not(recipe):
            yield f"FP8 {recipe}", f"skipped: {reason}"
            continue
        packed = _medium(folder, pad_multiple=32)
        exact, ours = (
            np.concatenate(_policy(folder, ctx, *precision).logprobs(packed, 1.0))
            for precision in (("fp32",), ("bf16", recipe))
        )
        gap = np.abs(exact - ours)
        found = f"{gap.mean():.1e}, {gap.max():.1e}"
        yield f"FP8 {recipe} against fp32: log-prob gap, mean, largest", found
        yield from _fp8_steps(folder, ctx, recipe)
        torch.cuda.empty_cache()


def _fp8_steps(folder: Path, ctx: ParallelContext, recipe: str) -> Iterator[Row]:
    model, packed, lengths = _large_inputs(folder, ctx)
    policy = _policy(model, ctx, "bf16", recipe)
    seconds, _ = _measured(lambda: policy.train_step(packed, NllLoss()), rounds=5)
    rate = 3 * _forward_operations(lengths) / seconds
    yield f"1.5B FP8 {recipe}, training step", f"{seconds:.2f} s in {_micro(packed)}"
    yield "  tokens a second", f"{sum(lengths) / seconds:,.0f}"
    for name, peaks in (("FP8", PEAK_FP8), ("bf16", PEAK_BF16)):
        yield f"  MFU against the dense {name} peak", f"{rate / peaks.get(_chip(), math.nan):.1%}"
    yield "  peak memory", f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB"


def _why_not(recipe: str) -> str | None:
    """Why the recipe cannot be run here; None if it can."""
    if not has_transformer_engine():
        return "TransformerEngine is not installed"
    return capability_problem(recipe, cuda_capability())


_LIMIT: dict[str, Any] = {"tokens_per_microbatch": 16_384}
PARTS: dict[str, Callable[[Path, ParallelContext], Iterator[Row]]] = {
    "numerics": numerics,
    "logprobs": logprobs,
    "step": step,
    "checkpoint": checkpoint,
    "fp8": fp8,
}
_kept: dict[str, tuple[Path, PackedStep, list[int]]] = {}
_policies: dict[str, MegatronPolicy] = {}


def _medium(folder: Path, pad_multiple: int = 1) -> PackedStep:
    """Samples for a model of 8 layers of 512, which is written to ``folder``."""
    size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 128}
    tiny_hf_folder(folder, "Qwen3", vocab_size=8192, **size)
    samples = random_samples(32, shortest=50, longest=500, vocab=8192)
    return pack(*samples, pad_multiple=pad_multiple, **_LIMIT)


def _large(folder: Path, ctx: ParallelContext) -> tuple[MegatronPolicy, PackedStep, list[int]]:
    """The 1.5B policy in bf16, its inputs and their lengths; made once."""
    model, packed, lengths = _large_inputs(folder, ctx)
    if "large" not in _policies:
        _policies["large"] = _policy(model, ctx, "bf16")
    return _policies["large"], packed, lengths


def _large_inputs(folder: Path, ctx: ParallelContext) -> tuple[Path, PackedStep, list[int]]:
    """The 1.5B model's folder, 65,536 tokens padded for any recipe, their lengths; made once."""
    if "large" not in _kept:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        model = folder / "qwen2-1.5b"
        with torch.device(ctx.device):
            made = Qwen2ForCausalLM(Qwen2Config(dtype=torch.bfloat16, **QWEN_1_5B)).bfloat16()
        made.save_pretrained(model)
        del made
        torch.cuda.empty_cache()
        draw = np.random.default_rng(0)
        lengths = np.clip(draw.lognormal(7.2, 0.8, 200).astype(int), 64, 8192)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 65_536))].tolist()
        samples = [
            random_samples(1, shortest=n, longest=n, vocab=151_936, seed=i)[0][0]
            for i, n in enumerate(lengths)
        ]
        weights = [np.full(n, 1.0 / sum(lengths), np.float32) for n in lengths]
        for weight in weights:
            weight[0] = 0.0  # nothing predicts the first token
        origins = [Origin.ON_POLICY] * len(samples)
        packed = pack(samples, weights, origins, mix_lengths=True, pad_multiple=32, **_LIMIT)
        _kept["large"] = model, packed, lengths
    return _kept["large"]


def _policy(
    folder: Path, ctx: ParallelContext, precision: str, recipe: str = "none"
) -> MegatronPolicy:
    """With no layer left in bf16, so that recipes compare."""
    fp8 = {"recipe": recipe, "bf16_layers_at_start": 0, "bf16_layers_at_end": 0}
    section = PolicySection(precision=precision, fp8=fp8, **_LIMIT)
    return MegatronPolicy.from_hf(folder, section, OptimizerSection(lr=1e-5), 100, ctx)


def _on(ctx: ParallelContext, packed: PackedStep) -> list[object]:
    return [batch.to(ctx.device) for batch in packed.micro_batches[0]]


def _forward_operations(lengths: list[int]) -> float:
    """Floating-point operations of one forward pass over sequences of these lengths."""
    shape = QWEN_1_5B
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    head = hidden // shape["num_attention_heads"]
    kv = shape["num_key_value_heads"] * head
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * shape["intermediate_size"]
    products = 2 * sum(lengths) * (layers * layer + hidden * shape["vocab_size"])
    attention = 2 * 2 * layers * hidden * sum(n * n / 2 for n in lengths)
    return products + attention


def _measured(run: Callable[[], object], rounds: int) -> tuple[float, int]:
    """(median seconds, peak bytes beyond what was held) of a call on the GPU."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, times = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times), torch.cuda.max_memory_allocated() - held


def _micro(packed: PackedStep) -> str:
    count = len(packed.micro_batches[0])
    return f"{count} micro-batch{'es' if count > 1 else ''}"


def _chip() -> str:
    name = torch.cuda.get_device_name()
    return next((chip for chip in PEAK_BF16 if chip in name), name)


def main() -> int:
    """Run the parts and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (repeatable)")
    parts = parser.parse_args().only or list(PARTS)
    if not torch.cuda.is_available():
        print("gpu: no CUDA device; this benchmark measures one", file=sys.stderr)
        return 2
    ctx = parallel.initialize(PolicySection(), seed=0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"bf16: {choose(PolicySection(precision='bf16'))[1]}\n")
    print(f"| {'what':<52} | {'seen':<44} |\n|{'-' * 54}|{'-' * 46}|")
    with tempfile.TemporaryDirectory() as folder:
        for name in parts:
            for what, seen in PARTS[name](Path(folder), ctx):
                print(f"| {what:<52} | {seen:<44} |", flush=True)
    parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
