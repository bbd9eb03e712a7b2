"""Adam on the CPU for a share of the parameters computes what Adam on the device computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.policy import offload
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder

OPTIMIZER = OptimizerSection(
    lr=1e-2, warmup_steps=2, schedule="cosine", weight_decay=0.5, clip_grad=0.05
)
PRECISIONS = ["fp32", "bf16"]


def make(path: Path, ctx: ParallelContext, share: float, **policy: Any) -> MegatronPolicy:
    section = PolicySection(distributed_optimizer=True, optimizer_offload=share, **policy)
    return MegatronPolicy.from_hf(path, section, OPTIMIZER, 10, ctx)


def train(policy: MegatronPolicy, steps: int) -> list[float]:
    """Of each step the rate, the gradient norm before clipping, and the loss."""
    packed = pack(*random_samples(), tokens_per_microbatch=200)
    reports = [policy.train_step(packed, WeightedNll()) for _ in range(steps)]
    return [report[key] for report in reports for key in ("lr", "grad_norm", "loss/total")]


def exported(policy: MegatronPolicy) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in policy.export_weights() if t is not None}


def same(one: MegatronPolicy, other: MegatronPolicy) -> None:
    expected = exported(one)
    for name, tensor in exported(other).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7, msg=name)


def on_host(policy: MegatronPolicy) -> float:
    """Share of the parameters whose optimizer works on a copy in host memory."""
    (part,) = policy._optimizer.chained_optimizers
    assert offload.is_hybrid(part)
    copied = sum(p.numel() for p in part.optimizer.gpu_params_map_cpu_copy)
    return copied / sum(p.numel() for g in part.param_groups for p in g["params"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_weights(precision: str, tmp_path: Path, ctx: ParallelContext) -> None:
    """With a clipped gradient, a moving rate, and decay on matrices only."""
    tiny_hf_folder(tmp_path)
    plain = make(tmp_path, ctx, 0.0, precision=precision)
    before = exported(plain)
    reports = train(plain, 3)
    assert min(reports[1::3]) > OPTIMIZER.clip_grad and len(set(reports[::3])) == 3
    for share in (0.5, 1.0):
        policy = make(tmp_path, ctx, share, precision=precision)
        assert share <= on_host(policy) < share + 0.3
        assert train(policy, 3) == pytest.approx(reports, rel=1e-6)
        same(plain, policy)
    moved = exported(plain)
    assert all(not torch.equal(moved[name], before[name]) for name in before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_goes_on_at_any_share(
    precision: str, tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    for share in (0.5, 0.0):
        policy = make(tmp_path / "hf", ctx, share, precision=precision)
        train(policy, 2)
        policy.save(tmp_path / f"state-{share}")
        expected = train(policy, 2)
        for other in (0.0, 0.5, 1.0):
            if share or other:
                resumed = make(tmp_path / "hf", ctx, other, precision=precision)
                resumed.load(tmp_path / f"state-{share}")
                told = f"saved at {share}, loaded at {other}"
                assert train(resumed, 2) == pytest.approx(expected, rel=1e-6), told
                same(policy, resumed)
                resumed.load(tmp_path / f"state-{share}")  # over state of its own
                assert train(resumed, 2) == pytest.approx(expected, rel=1e-6), told


def test_weights_without_optimizer_state_reach_the_copies(
    tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    tiny_hf_folder(tmp_path / "other", "Qwen3", initializer_range=0.1)
    for precision in PRECISIONS:
        start = make(tmp_path / "other", ctx, 0.0, precision=precision)
        start.save(tmp_path / precision)
        policy = make(tmp_path / "hf", ctx, 0.5, precision=precision)
        policy.load(tmp_path / precision)
        assert train(policy, 2) == pytest.approx(train(start, 2), rel=1e-6)
        same(start, policy)


def test_what_cannot_be_is_refused(tmp_path: Path, ctx: ParallelContext) -> None:
    tiny_hf_folder(tmp_path / "hf")
    section = PolicySection(optimizer_offload=0.5)
    with pytest.raises(ConfigError, match=r"set policy\.distributed_optimizer=true"):
        MegatronPolicy.from_hf(tmp_path / "hf", section, OPTIMIZER, 10, ctx)
    plain = MegatronPolicy.from_hf(tmp_path / "hf", PolicySection(), OPTIMIZER, 10, ctx)
    train(plain, 1)
    plain.save(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"saved with policy\.distributed_optimizer=false"):
        make(tmp_path / "hf", ctx, 0.5).load(tmp_path / "state")
