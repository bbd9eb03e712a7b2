"""A mixture of experts on one rank: equal to transformers and to the embedded engine."""

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_policy import WeightedNll, exported, gradient, make, packed
from torch import Tensor

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.data.packing import pack
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.testing.recorded import recorded_samples
from megatron_spear.testing.tiny import hf_logprobs, random_samples, tiny_hf_folder

EXPERT = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc{}.weight"


def hf_loss(model: Any) -> Tensor:
    samples, weights, _ = random_samples()
    return sum(
        -(hf_logprobs(model, sample.token_ids) * torch.from_numpy(weight)).sum()
        for sample, weight in zip(samples, weights, strict=True)
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chosen", [2, 3])
def test_equals_transformers(
    chosen: int, normalize: bool, tmp_path: Path, ctx: ParallelContext
) -> None:
    changes = {"num_experts_per_tok": chosen, "norm_topk_prob": normalize}
    model = tiny_hf_folder(tmp_path, "Qwen3Moe", **changes)
    policy = make(tmp_path, ctx)
    samples, _, _ = random_samples()
    with torch.no_grad():
        for sample, values in zip(samples, policy.logprobs(packed(), 0.8), strict=True):
            want = hf_logprobs(model, sample.token_ids, 0.8)
            torch.testing.assert_close(torch.from_numpy(values), want, rtol=0, atol=1e-5)
    hf_loss(model).backward()
    ours = gradient(policy, packed())
    for number, layer in enumerate(model.model.layers):
        theirs = {f"decoder.layers.{number}.mlp.router.weight": layer.mlp.gate.weight.grad}
        for expert in range(8):
            experts = layer.mlp.experts
            theirs[EXPERT.format(number, expert, 1)] = experts.gate_up_proj.grad[expert]
            theirs[EXPERT.format(number, expert, 2)] = experts.down_proj.grad[expert]
        for name, want in theirs.items():
            assert want.norm() > 0
            assert ((ours[name] - want).norm() / want.norm()).item() < 1e-5, name


def test_export_is_the_folder_bit_for_bit(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path, "Qwen3Moe")
    with HfReader(tmp_path) as reader:
        weights = exported(make(tmp_path, ctx))
        assert set(weights) == set(reader.names)
        assert all(torch.equal(tensor, reader.get(name)) for name, tensor in weights.items())


def test_the_gradient_norm_has_the_experts_in_it(tmp_path: Path, ctx: ParallelContext) -> None:
    model = tiny_hf_folder(tmp_path, "Qwen3Moe")
    hf_loss(model).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    report = make(tmp_path, ctx).train_step(packed(), WeightedNll())
    assert report["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(precision: str, tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path / "hf", "Qwen3Moe")
    policy, other = (make(tmp_path / "hf", ctx, precision=precision) for _ in range(2))
    policy.train_step(packed(), WeightedNll())
    policy.save(tmp_path / "state")
    other.load(tmp_path / "state")
    assert policy.train_step(packed(), WeightedNll()) == other.train_step(packed(), WeightedNll())
    weights = exported(policy)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(other).items())


def test_the_engine_draws_from_the_policy(tmp_path: Path, ctx: ParallelContext) -> None:
    """Before and after an update that goes to the engine by way of the export."""
    tiny_hf_folder(tmp_path, "Qwen3Moe")
    policy = make(tmp_path, ctx)
    samples, weights, origins = recorded_samples(tmp_path)
    step = pack(samples, weights, origins, tokens_per_microbatch=200)
    for sample, ours in zip(samples, policy.logprobs(step, 1.0), strict=True):
        mask = sample.response_mask
        np.testing.assert_allclose(sample.rollout_logprobs[mask], ours[mask], rtol=0, atol=1e-5)
    loss = PolicyLoss.from_sections(AlgorithmSection(), ReplaySection().loss, temperature=1.0)
    assert policy.train_step(step, loss)["grad_norm"] > 0
    engine = EmbeddedEngine.from_hf(tmp_path, max_slots=2, max_context=64, deadline_s=20.0)
    engine.load_weights(policy.export_weights(), 1)
    request = GenerationRequest(
        session="s",
        token_ids=samples[0].token_ids[:9],
        sampling=SamplingParams(temperature=1.0, max_new_tokens=8, stop_token_ids=()),
        seed=(0,),
    )
    answer = asyncio.run(engine.generate(request))
    tokens = np.concatenate((request.token_ids, answer.token_ids))
    sample = make_sample(mask=[1] * len(tokens), token_ids=tokens)
    again = pack([sample], [np.zeros(len(tokens))], origins[:1], tokens_per_microbatch=200)
    (ours,) = policy.logprobs(again, 1.0)
    np.testing.assert_allclose(answer.logprobs, ours[9:], rtol=0, atol=1e-5)
