"""Which Adam is used is read off the optimizer, and one that is not torch's is saved as Megatron
does it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.policy import optimizer as module
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts steps by group, as TransformerEngine's and apex's do."""

    def __init__(self, params: Any, lr: float, adam_w_mode: bool, **defaults: Any) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = count = group.get("step", 0) + 1
            (first, second), rate = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                scale = (state["exp_avg_sq"] / (1 - second**count)).sqrt() + group["eps"]
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(rate / (1 - first**count) * state["exp_avg"] / scale)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron as where TransformerEngine is installed, as far as its Adam goes."""
    monkeypatch.setattr(megatron_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)


def make(path: Path, ctx: ParallelContext, **policy: Any) -> MegatronPolicy:
    section = PolicySection(**policy)
    return MegatronPolicy.from_hf(path, section, OptimizerSection(lr=1e-2), 10, ctx)


def train(policy: MegatronPolicy, steps: int) -> list[float]:
    packed = pack(*random_samples(), tokens_per_microbatch=200)
    return [policy.train_step(packed, WeightedNll())["loss/total"] for _ in range(steps)]


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16"}, {"distributed_optimizer": True}], ids=str
)
def test_another_adam_is_saved_and_loaded(
    changes: dict[str, Any], tmp_path: Path, ctx: ParallelContext, request: pytest.FixtureRequest
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    torchs = train(make(tmp_path / "hf", ctx, **changes), 4)
    request.getfixturevalue("fused")
    policy = make(tmp_path / "hf", ctx, **changes)
    assert type(policy._optimizer.chained_optimizers[0].optimizer) is FusedAdam
    begun = train(policy, 2)
    policy.save(tmp_path / "state")
    expected = train(policy, 2)
    assert begun + expected == pytest.approx(torchs, rel=1e-3 if "precision" in changes else 1e-5)
    resumed = make(tmp_path / "hf", ctx, **changes)
    resumed.load(tmp_path / "state")
    assert train(resumed, 2) == expected
    assert {g["step"] for g in resumed._optimizer.param_groups} == {4}


def test_the_log_says_once_which_adam_it_is(
    tmp_path: Path,
    ctx: ParallelContext,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_hf_folder(tmp_path)
    module._say.cache_clear()
    with caplog.at_level(logging.INFO, "megatron_spear.policy.optimizer"):
        make(tmp_path, ctx)
        make(tmp_path, ctx).reset_optimizer(OptimizerSection(), 5)
    plain = "optimizer: AdamW of torch (fused kernel)"
    missing = "; apex and TransformerEngine are not installed"
    told = [r.getMessage() for r in caplog.records if r.name == module.__name__]
    assert told == [plain + missing]
    shared = make(tmp_path, ctx, distributed_optimizer=True, optimizer_offload=0.5)
    assert module.describe(shared._optimizer) == (
        f"{plain} on the CPU, AdamW of torch (fused kernel) on the GPU{missing}"
    )
    monkeypatch.setattr(module, "find_spec", lambda name: name == "apex" or None)
    assert module.describe(make(tmp_path, ctx)._optimizer) == (
        f"{plain}; TransformerEngine is not installed; apex: installed, but Megatron could not "
        "import it"
    )
    request.getfixturevalue("fused")
    assert module.describe(make(tmp_path, ctx)._optimizer) == f"optimizer: FusedAdam of {__name__}"
