"""One rank: equal to transformers, independent of packing, exact after a resume."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_spear.algorithms.policy_loss import TokenLoss
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.data.packing import PackedStep, pack
from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.policy.parallel import ParallelContext, seed_generators
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.tiny import hf_logprobs, random_samples, tiny_hf_folder
from megatron_spear.trainer.work import forward_flops


def make(path: Path, ctx: ParallelContext, **policy: Any) -> MegatronPolicy:
    optimizer = OptimizerSection(lr=1e-3, warmup_steps=2, schedule="linear")
    return MegatronPolicy.from_hf(path, PolicySection(**policy), optimizer, 10, ctx)


def packed(limit: int = 200) -> PackedStep:
    return pack(*random_samples(), tokens_per_microbatch=limit)


def gradient(
    policy: MegatronPolicy, step: PackedStep, loss: TokenLoss | None = None
) -> dict[str, Tensor]:
    policy.compute_gradient(step.micro_batches[0], loss or WeightedNll())
    return {name: p.main_grad.clone() for name, p in policy._chunks[0].named_parameters()}


def exported(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in policy.export_weights() if t is not None}


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen2", "Llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_transformers(
    architecture: str, tied: bool, tmp_path: Path, ctx: ParallelContext
) -> None:
    model = tiny_hf_folder(tmp_path, architecture, tie_word_embeddings=tied)
    policy = make(tmp_path, ctx)
    samples, weights, _ = random_samples()
    step = packed()
    got, entropies = policy.logprobs(step, temperature=0.8, with_entropy=True)
    with torch.no_grad():
        for sample, values, entropy in zip(samples, got, entropies, strict=True):
            want = hf_logprobs(model, sample.token_ids, 0.8)
            torch.testing.assert_close(torch.from_numpy(values), want, rtol=0, atol=1e-5)
            assert entropy[0] == 0 and (entropy[1:] > 0).all()
    loss = sum(
        -(hf_logprobs(model, sample.token_ids) * torch.from_numpy(weight)).sum()
        for sample, weight in zip(samples, weights, strict=True)
    )
    loss.backward()
    grads = gradient(policy, step)
    for ours, theirs in (
        ("embedding.word_embeddings.weight", model.model.embed_tokens),
        ("decoder.layers.0.mlp.linear_fc2.weight", model.model.layers[0].mlp.down_proj),
        ("decoder.layers.1.input_layernorm.weight", model.model.layers[1].input_layernorm),
    ):
        want = theirs.weight.grad
        assert ((grads[ours] - want).norm() / want.norm()).item() < 1e-5
    state = model.state_dict()
    weights_out = exported(policy)
    assert set(weights_out) == set(state) - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights_out.items())


def test_gradient_does_not_depend_on_packing(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path)
    policy = make(tmp_path, ctx)
    one = gradient(policy, packed(10_000))
    assert len(packed(10_000).micro_batches[0]) == 1
    assert not policy.mix_lengths, "on a CPU it would cost padding"
    for step in (
        packed(100),
        pack(*random_samples(), tokens_per_microbatch=150, pad_multiple=64),
        pack(*random_samples(), tokens_per_microbatch=100, mix_lengths=True),
    ):
        assert len(step.micro_batches[0]) > 2
        for name, grad in gradient(policy, step).items():
            assert ((grad - one[name]).norm() / one[name].norm()).item() < 1e-5, name


class KeptBytes(WeightedNll):
    """Counts what autograd keeps of the forward pass, weights apart, until the loss is there."""

    def __init__(self, policy: MegatronPolicy) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in policy._chunks[0].parameters()}
        self.seen: dict[int, torch.UntypedStorage] = {}
        self.total = 0

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.seen[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    def __call__(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.total = sum(s.nbytes() for at, s in self.seen.items() if at not in self.weights)
        return super().__call__(*args)


def test_recomputed_activations_are_not_kept_and_change_nothing(
    tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path)
    step, gradients, kept = packed(10_000), {}, {}
    for recompute in ("none", "selective", "full"):
        policy = make(tmp_path, ctx, recompute=recompute)
        loss = KeptBytes(policy)
        with torch.autograd.graph.saved_tensors_hooks(loss.count, lambda tensor: tensor):
            gradients[recompute] = gradient(policy, step, loss)
        kept[recompute] = loss.total
    for recompute in ("selective", "full"):
        for name, grad in gradients[recompute].items():
            torch.testing.assert_close(grad, gradients["none"][name], rtol=1e-6, atol=1e-9)
    assert kept["selective"] < 0.8 * kept["none"]
    assert kept["full"] < 0.2 * kept["none"]


def test_training_lowers_the_loss_and_reports(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path)
    policy = make(tmp_path, ctx)
    reports = [policy.train_step(packed(), WeightedNll()) for _ in range(4)]
    assert reports[-1]["loss/total"] < reports[0]["loss/total"]
    assert [r["lr"] for r in reports] == pytest.approx([5e-4, 1e-3, 8.75e-4, 7.5e-4])
    samples, _, _ = random_samples()
    assert reports[0]["tokens"] == sum(len(s.token_ids) - 1 for s in samples)
    assert reports[0]["grad_norm"] > 0 and reports[0]["skipped"] == 0


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe"])
def test_update_is_adamw_without_decay_on_norms(
    architecture: str, tmp_path: Path, ctx: ParallelContext
) -> None:
    model = tiny_hf_folder(tmp_path, architecture)
    optimizer = OptimizerSection(lr=1e-3, weight_decay=0.5, clip_grad=0.1)
    policy = MegatronPolicy.from_hf(tmp_path, PolicySection(), optimizer, 10, ctx)
    samples, weights, _ = random_samples()
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.5},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for _ in range(2):
        plain.zero_grad()
        for sample, weight in zip(samples, weights, strict=True):
            (-(hf_logprobs(model, sample.token_ids) * torch.from_numpy(weight)).sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        plain.step()
        report = policy.train_step(packed(), WeightedNll())
        assert report["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    model.save_pretrained(tmp_path / "after")
    with HfReader(tmp_path / "after") as reader:
        for name, tensor in policy.export_weights():
            torch.testing.assert_close(tensor, reader.get(name), rtol=0, atol=2e-5, msg=name)


def test_not_finite_gradient_is_skipped(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path)
    policy = make(tmp_path, ctx)
    before = exported(policy)
    report = policy.train_step(packed(), WeightedNll(factor=math.inf))
    assert report["skipped"] == 1 and math.isnan(report["grad_norm"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.export_weights())
    assert policy.train_step(packed(), WeightedNll())["skipped"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in exported(policy).values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_resume_is_exact(
    precision: str, steps_before: int, tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    policy = make(tmp_path / "hf", ctx, precision=precision)
    for _ in range(steps_before):
        policy.train_step(packed(), WeightedNll())
    policy.save(tmp_path / "state")
    expected = [policy.train_step(packed(), WeightedNll()) for _ in range(2)]
    resumed = make(tmp_path / "hf", ctx, precision=precision)
    resumed.load(tmp_path / "state")
    assert [resumed.train_step(packed(), WeightedNll()) for _ in range(2)] == expected
    want = exported(policy)
    assert all(torch.equal(tensor, want[name]) for name, tensor in exported(resumed).items())


def draws() -> list[Tensor]:
    """One draw from each generator, Megatron's by name included."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    found = [torch.rand(3), torch.rand(3)]
    for name in get_cuda_rng_tracker().get_states():
        with get_cuda_rng_tracker().fork(name):
            found.append(torch.rand(3))
    return found


def test_random_generators_go_on_where_they_were(
    tmp_path: Path, ctx: ParallelContext, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    policy = make(tmp_path / "hf", ctx)
    seed_generators(7)
    draws()
    policy.save(tmp_path / "state")
    expected = draws()
    assert len(expected) == 5 and len({tuple(t.tolist()) for t in expected}) == 5
    policy.load(tmp_path / "state")
    assert all(map(torch.equal, draws(), expected))
    # as it was written before generators were saved
    about = json.loads((tmp_path / "state" / "policy.json").read_text())
    assert about.pop("rng_layout") == dict.fromkeys(
        ("pipeline", "tensor", "context", "data", "expert"), 1
    )
    (tmp_path / "state" / "policy.json").write_text(json.dumps(about))
    with caplog.at_level(logging.INFO):
        policy.load(tmp_path / "state")
    assert "no random generators, this is" in caplog.text and "seeded anew" in caplog.text
    found = draws()
    seed_generators(ctx.seed)
    assert all(map(torch.equal, draws(), found))


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16"}, {"distributed_optimizer": True}], ids=str
)
def test_resume_after_nothing_but_a_skipped_step(
    changes: dict[str, Any], tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    policy = make(tmp_path / "hf", ctx, **changes)
    policy.train_step(packed(), WeightedNll(factor=math.inf))
    policy.save(tmp_path / "state")
    expected = [policy.train_step(packed(), WeightedNll()) for _ in range(2)]
    resumed = make(tmp_path / "hf", ctx, **changes)
    resumed.load(tmp_path / "state")
    assert [resumed.train_step(packed(), WeightedNll()) for _ in range(2)] == expected


def test_state_of_the_other_kind_of_optimizer_is_refused(
    tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    policy = make(tmp_path / "hf", ctx)
    distributed = make(tmp_path / "hf", ctx, distributed_optimizer=True)
    policy.save(tmp_path / "begin")
    distributed.load(tmp_path / "begin")  # no step was made: no optimizer state
    policy.train_step(packed(), WeightedNll())
    policy.save(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"saved with policy\.distributed_optimizer=false"):
        distributed.load(tmp_path / "state")


def test_broken_state_is_refused(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path / "hf")
    policy = make(tmp_path / "hf", ctx)
    policy.train_step(packed(), WeightedNll())
    state = tmp_path / "state"
    policy.save(state)
    with pytest.raises(CheckpointError, match="not empty"):
        policy.save(state)
    file = max(state.glob("*.distcp"), key=lambda f: f.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="does not fit or is damaged"):
        policy.load(state)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"is damaged.*{file.name}"):
        policy.load(state)
    file.write_bytes(whole)
    policy.load(state)
    (state / "policy.json").write_text('{"format": 2, "num_steps": 1}')
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        policy.load(state)
    (state / "policy.json").write_text('{"format"')
    with pytest.raises(CheckpointError, match="is damaged"):
        policy.load(state)
    with pytest.raises(CheckpointError, match=r"no policy\.json"):
        policy.load(tmp_path / "nowhere")


def test_state_of_another_model_is_refused(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path / "small")
    tiny_hf_folder(tmp_path / "wide", hidden_size=128)
    make(tmp_path / "small", ctx).save(tmp_path / "state")
    with pytest.raises(CheckpointError, match="does not fit or is damaged"):
        make(tmp_path / "wide", ctx).load(tmp_path / "state")


def test_misuse_is_named(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path)
    policy = make(tmp_path, ctx)
    with pytest.raises(ConfigError, match="got no packed step"):
        policy.logprobs(None, 1.0)
    with pytest.raises(ConfigError, match="packed for 2 data-parallel ranks"):
        step = pack(*random_samples(), tokens_per_microbatch=200, data_parallel=2)
        policy.logprobs(step, 1.0)


def halves() -> tuple[PackedStep, PackedStep]:
    samples, weights, origins = random_samples()
    middle = len(samples) // 2
    first, second = (
        pack(samples[part], weights[part], origins[part], tokens_per_microbatch=200)
        for part in (slice(0, middle), slice(middle, None))
    )
    return first, second


def test_two_parts_of_one_step_are_one_step(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path)
    whole, parted = make(tmp_path, ctx), make(tmp_path, ctx)
    first, second = halves()
    for _ in range(2):
        expected = whole.train_step(packed(), WeightedNll())
        report = parted.train_step(first, WeightedNll(), second)
        assert {k: report[k] for k in expected} == pytest.approx(expected, rel=1e-5)
        assert report["grad_norm"] < report["grad_norm_first"] + report["grad_norm_second"]
    norms = [
        math.sqrt(sum(g.square().sum().item() for g in gradient(parted, part).values()))
        for part in (first, second)
    ]
    report = parted.train_step(first, WeightedNll(), second)
    assert [report["grad_norm_first"], report["grad_norm_second"]] == pytest.approx(norms, rel=1e-5)
    whole.train_step(packed(), WeightedNll())
    ours, theirs = exported(parted), exported(whole)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def test_the_schedule_stands_still_for_a_step_that_is_not_scheduled(
    tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path)
    policy = make(tmp_path, ctx)
    scheduled = [True, False, True, False, False]
    rates = [policy.train_step(packed(), WeightedNll(), scheduled=s)["lr"] for s in scheduled]
    assert rates[0] == rates[1] < rates[2] == rates[3] == rates[4] and policy.num_steps == 2


def test_the_reference_keeps_its_weights(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path)
    policy = make(tmp_path, ctx)
    with pytest.raises(ConfigError, match="keep_reference"):
        policy.logprobs(packed(), 1.0, reference=True)
    policy.keep_reference()
    before = policy.logprobs(packed(), 1.0)
    for _ in range(3):
        policy.train_step(packed(), WeightedNll())
    weights, after = exported(policy), policy.logprobs(packed(), 1.0)
    reference = policy.logprobs(packed(), 1.0, reference=True)
    for mine, old, new in zip(reference, before, after, strict=True):
        assert (mine == old).all() and (mine != new).any()
    assert all((weights[k] == v).all() for k, v in exported(policy).items())
    assert all((a == b).all() for a, b in zip(policy.logprobs(packed(), 1.0), after, strict=True))


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe"])
def test_its_matrix_products_are_those_the_work_counts(
    architecture: str, tmp_path: Path, ctx: ParallelContext
) -> None:
    """All but attention, whose kernel torch does not count on a CPU."""
    tiny_hf_folder(tmp_path, architecture)
    policy, step = make(tmp_path, ctx), packed()
    lengths = [1] * step.num_tokens
    attention = 2 * policy.shape.num_layers * policy.shape.num_heads * policy.shape.head_dim
    expected = forward_flops(policy.shape, lengths) - attention * step.num_tokens
    with FlopCounterMode(display=False) as forward:
        policy.logprobs(step, 1.0)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as both:
        policy.compute_gradient(step.micro_batches[0], WeightedNll())
    assert both.get_total_flops() == 3 * expected
