"""TransformerEngine's layers, through the stand-in for it, against the local ones; FP8; the audit.

All cases of one number of ranks run one after the other in the same processes, which alone have the
stand-in; each test then looks at some of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder

MODELS = ("Qwen3", "Qwen2", "Qwen3Moe")
LOCAL, TE = {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}
BF16 = {"precision": "bf16"}
SP = {"tensor_parallel": 2, "sequence_parallel": True}
ENDS = {"bf16_layers_at_start": 0, "bf16_layers_at_end": 0}
SPLIT = {"distributed_optimizer": True}
LAYERS = 4


def fp8(recipe: str, **changes: Any) -> dict[str, Any]:
    ends = ENDS if recipe == "delayed" else {}
    return BF16 | {"fp8": {"recipe": recipe} | ends | changes}


CASES: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    1: {
        **{f"{model} local": (model, LOCAL) for model in MODELS},
        **{f"{model} TE": (model, TE) for model in MODELS},
        "bf16 local": ("Qwen3", LOCAL | BF16),
        "bf16 TE": ("Qwen3", BF16),  # auto
        "delayed": ("Qwen3", fp8("delayed")),
        "tensorwise": ("Qwen3", fp8("tensorwise")),
        "blockwise": ("Qwen3", fp8("blockwise", format="hybrid")),
        "mxfp8": ("Qwen3", fp8("mxfp8")),
        "tensorwise, recompute": ("Qwen3", fp8("tensorwise") | {"recompute": "full"}),
        "tensorwise, experts": ("Qwen3Moe", fp8("tensorwise")),
        "held, delayed": ("Qwen3", fp8("delayed", parameters=True) | SPLIT),
        "held, experts": ("Qwen3Moe", fp8("blockwise", parameters=True) | SPLIT),
    },
    2: {
        "Qwen3 local": ("Qwen3", LOCAL | SP),
        "Qwen3 TE": ("Qwen3", TE | SP),
        "Qwen2 local": ("Qwen2", LOCAL | {"tensor_parallel": 2}),
        "Qwen2 TE": ("Qwen2", TE | {"tensor_parallel": 2}),
        "Qwen3Moe local": ("Qwen3Moe", LOCAL | SP),
        "Qwen3Moe TE": ("Qwen3Moe", TE | SP),
        "Qwen3Moe local EP2": ("Qwen3Moe", LOCAL | SP | {"expert_parallel": 2}),
        "Qwen3Moe TE EP2": ("Qwen3Moe", TE | SP | {"expert_parallel": 2}),
        "tensorwise VPP2": (
            "Qwen3",
            fp8("tensorwise") | {"pipeline_parallel": 2, "virtual_pipeline": 2},
        ),
        "held, DP2": ("Qwen3", fp8("tensorwise", parameters=True) | SPLIT),
    },
}
STEPS = 3


def run(root: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """On every rank, what each case gives: see ``run_case``, and what loads what."""
    from megatron_spear.policy import parallel

    found: dict[str, dict[str, Any]] = {}
    for name, (model, changes) in cases.items():
        section = PolicySection(**changes)
        ctx = parallel.initialize(section, seed=0, timeout_s=60)
        found[name] = run_case(root, name, model, section, ctx)
        parallel.destroy(keep_world=True)
    return found


def run_case(root: Path, name: str, model: str, section: PolicySection, ctx: Any) -> dict[str, Any]:
    from megatron_spear.policy import precision_audit

    policy = make(root / model, section, ctx)
    packed, loss = packed_for(policy), WeightedNll()
    result = {"untrained": exported(policy), "logprobs": policy.logprobs(packed, 0.9)}
    result["reports"] = [policy.train_step(packed, loss)]
    if not section.distributed_optimizer:
        result["gradient"] = exported_gradient(policy)
    policy.save(root / f"{name}-{ctx.world_size}")
    result["saved"] = exported(policy)
    result["reports"] += [policy.train_step(packed, loss) for _ in range(STEPS - 1)]
    result["seen"] = precision_audit.observe(policy)
    other = make(root / model, section, ctx)
    other.load(root / f"{name}-{ctx.world_size}")
    result["loaded"] = exported(other)
    result["going on"] = [other.train_step(packed, loss) for _ in range(STEPS - 1)]
    result["marked"] = marked(policy)
    return result


def load_others(root: Path, jobs: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    """For each (model, saved case, layout): what the next steps report."""
    from megatron_spear.policy import parallel

    found = []
    for model, name, changes in jobs:
        section = PolicySection(**changes)
        ctx = parallel.initialize(section, seed=0, timeout_s=60)
        policy = make(root / model, section, ctx)
        policy.load(root / name)
        packed = packed_for(policy)
        found.append([policy.train_step(packed, WeightedNll()) for _ in range(STEPS - 1)])
        parallel.destroy(keep_world=True)
    return found


def make(folder: Path, section: PolicySection, ctx: Any) -> Any:
    from megatron_spear.policy.policy import MegatronPolicy

    return MegatronPolicy.from_hf(folder, section, OptimizerSection(lr=1e-3), 10, ctx)


def packed_for(policy: Any) -> Any:
    if not policy.ctx.is_controller:
        return None
    return pack(
        *random_samples(),
        data_parallel=policy.ctx.data_size,
        tokens_per_microbatch=200,
        pad_multiple=policy.pad_multiple,
        mix_lengths=policy.mix_lengths,
        microbatch_multiple=policy.microbatch_multiple,
    )


def exported(policy: Any) -> dict[str, np.ndarray]:
    return {n: t.float().numpy().copy() for n, t in policy.export_weights() if t is not None}


def exported_gradient(policy: Any) -> dict[str, np.ndarray]:
    """The clipped gradient of the last step, by way of the weight export."""
    parameters = policy._parameters()
    kept = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    result = exported(policy)
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data = data
    return result


def marked(policy: Any) -> dict[str, tuple[bool, int, bool]]:
    """By local name, how Megatron takes each matrix: split, along which axis, as dense."""
    from megatron_spear.policy.weights import parameters_of

    return {
        name: (p.tensor_model_parallel, p.partition_dim, getattr(p, "allreduce", True))
        for chunk in policy._chunks
        for name, p in parameters_of(chunk).items()
        if p.dim() == 2 and "router" not in name
    }


@cache
def results_of(ranks: int, root: Path) -> dict[str, dict[str, Any]]:
    every = run_ranks(run, ranks, root, CASES[ranks], timeout_s=280, fake_te=True)
    for name, result in every[0].items():  # the audit's other pieces of the model
        result["seen"] = sorted({entry for rank in every for entry in rank[name]["seen"]})
    return every[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("te")
    for model in MODELS:
        tiny_hf_folder(root / model, model, num_hidden_layers=LAYERS)
    return root


pytestmark = pytest.mark.xdist_group("transformer_engine")


def test_dev(root: Path) -> None:
    for ranks in (1, 2):
        for name, r in results_of(ranks, root).items():
            print(
                ranks,
                name,
                [round(x["loss/total"], 4) for x in r["reports"]],
                [round(x["loss/total"], 4) for x in r["going on"]],
                [round(x["grad_norm"], 4) for x in r["reports"]],
            )
            from megatron_spear.policy.precision_audit import table

            print("\n".join(table(r["seen"])))
