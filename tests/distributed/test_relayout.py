"""State saved at one layout goes on at another: the next losses and gradient norms are the same, so
weights, Adam's moments and its count of steps have all arrived.

The buckets of gradient buffers are made small, so that even this model has several.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from layout_matrix import OVERLAPPED, SPLIT, TP2, VPP2

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder

TP2_PP2 = {"tensor_parallel": 2, "pipeline_parallel": 2}
EP2, EP4 = {"expert_parallel": 2}, {"expert_parallel": 4}

SAVED: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2xPP2": (4, TP2_PP2),
    "split DP1": (1, SPLIT),
    "split DP2": (2, OVERLAPPED),
    "split PP2xDP2": (4, SPLIT | {"pipeline_parallel": 2}),  # tied: embeddings in a bucket apart
    "split CP2": (2, OVERLAPPED | {"context_parallel": 2}),
    "split DP2, bf16": (2, SPLIT | {"precision": "bf16"}),
    "half on the CPU, DP2": (2, OVERLAPPED | {"optimizer_offload": 0.5}),
    "experts EP2xPP2": (4, EP2 | {"pipeline_parallel": 2}),
    "experts split EP2xTP2": (4, OVERLAPPED | EP2 | TP2),
}
LOADED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "TP2xPP2 to one rank": ("TP2xPP2", 1, {}),
    "TP2xPP2 to TP4": ("TP2xPP2", 4, {"tensor_parallel": 4}),
    "TP2xPP2 to PP4": ("TP2xPP2", 4, {"pipeline_parallel": 4}),
    "TP2xPP2 to PP2xVPP2": ("TP2xPP2", 2, VPP2),
    "split DP2 to DP2": ("split DP2", 2, OVERLAPPED),
    "split DP2 to DP1": ("split DP2", 1, SPLIT),
    "split DP1 to DP2": ("split DP1", 2, SPLIT),
    "split DP1 to DP2, overlapped": ("split DP1", 2, OVERLAPPED),
    "split PP2xDP2 to TP2": ("split PP2xDP2", 2, SPLIT | {"tensor_parallel": 2}),
    "split CP2 to DP1": ("split CP2", 1, SPLIT),
    "split DP1 to CP2": ("split DP1", 2, SPLIT | {"context_parallel": 2}),
    "split DP2, bf16 to DP2": ("split DP2, bf16", 2, SPLIT | {"precision": "bf16"}),
    "split DP2, bf16 to all on the CPU": (
        "split DP2, bf16",
        2,
        OVERLAPPED | {"precision": "bf16", "optimizer_offload": 1.0},
    ),
    "half on the CPU, DP2 to DP1": ("half on the CPU, DP2", 1, SPLIT),
    "split PP2xDP2 to PP2, half on the CPU": (
        "split PP2xDP2",
        2,
        SPLIT | {"pipeline_parallel": 2, "optimizer_offload": 0.5},
    ),
    "experts EP2xPP2 to one rank": ("experts EP2xPP2", 1, {}),
    "experts EP2xPP2 to EP4xTP2": ("experts EP2xPP2", 4, EP4 | TP2),
    "experts split EP2xTP2 to one rank": ("experts split EP2xTP2", 1, SPLIT),
    "experts split EP2xTP2 to EP2xPP2": (
        "experts split EP2xTP2",
        4,
        SPLIT | EP2 | {"pipeline_parallel": 2},
    ),
}
BEFORE, AFTER = 2, 3


Job = tuple[str | None, dict[str, Any], str]
"""(State to load, layout, state to save or name of the test); names begin with ``experts`` if the
model is to have some."""


def run(root: Path, jobs: list[Job]) -> list[list[float]]:
    """On every rank, for each job: what the next steps report.

    A job that loads nothing makes ``BEFORE`` steps first and then saves.
    """
    from megatron_spear.policy import parallel
    from megatron_spear.policy import policy as module

    settings = module.DistributedDataParallelConfig
    module.DistributedDataParallelConfig = partial(settings, bucket_size=20_000)
    found = []
    for load, changes, name in jobs:
        section = PolicySection(**changes)
        ctx = parallel.initialize(section, seed=0, timeout_s=60)
        optimizer = OptimizerSection(lr=3e-3)
        folder = root / ("experts" if name.startswith("experts") else "hf")
        policy = module.MegatronPolicy.from_hf(folder, section, optimizer, 10, ctx)
        packed, loss = None, None
        if ctx.is_controller:
            packed, loss = packed_for(policy), WeightedNll()
        if load is not None:
            policy.load(root / load)
        else:
            for _ in range(BEFORE):
                policy.train_step(packed, loss)
            policy.save(root / name)
        reports = [policy.train_step(packed, loss) for _ in range(AFTER)]
        found.append([r[key] for r in reports for key in ("loss/total", "grad_norm")])
        parallel.destroy(keep_world=True)
    return found


def packed_for(policy: Any) -> Any:
    return pack(
        *random_samples(),
        data_parallel=policy.ctx.data_size,
        tokens_per_microbatch=150,
        pad_multiple=policy.pad_multiple,
        sequence_multiple=policy.sequence_multiple,
        microbatch_multiple=policy.microbatch_multiple,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("relayout")
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    tiny_hf_folder(root / "hf", **sizes)
    tiny_hf_folder(root / "experts", "Qwen3Moe")
    return root


@cache
def going_on(root: Path) -> dict[str, list[float]]:
    """What each saver reports after it has saved."""
    found = {}
    for ranks in (1, 2, 4):
        jobs = {name: (None, v, name) for name, (count, v) in SAVED.items() if count == ranks}
        results = run_ranks(run, ranks, root, list(jobs.values()), timeout_s=240)[0]
        found |= dict(zip(jobs, results, strict=True))
    return found


@cache
def gone_on(root: Path) -> dict[str, list[float]]:
    """What each loader reports."""
    found = {}
    for ranks in (1, 2, 4):
        jobs = {n: (save, v, n) for n, (save, count, v) in LOADED.items() if count == ranks}
        results = run_ranks(run, ranks, root, list(jobs.values()), timeout_s=240)[0]
        found |= dict(zip(jobs, results, strict=True))
    return found


@pytest.mark.parametrize("name", LOADED)
def test_the_next_losses_are_the_same(name: str, root: Path) -> None:
    expected = going_on(root)
    assert gone_on(root)[name] == pytest.approx(expected[LOADED[name][0]], rel=1e-5)


def test_what_is_compared_depends_on_the_optimizers_state(root: Path) -> None:
    """The test's power: the same weights with Adam begun anew give other losses."""
    expected = going_on(root)["split DP1"]
    (anew,) = run_ranks(run_with_adam_anew, 1, root, timeout_s=60)
    assert anew[:2] == pytest.approx(expected[:2], rel=1e-5)
    assert abs(anew[2] - expected[2]) > 1e-3 * expected[2]


def run_with_adam_anew(root: Path) -> list[float]:
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy

    section, optimizer = PolicySection(**SPLIT), OptimizerSection(lr=3e-3)
    ctx = parallel.initialize(section, seed=0, timeout_s=60)
    policy = MegatronPolicy.from_hf(root / "hf", section, optimizer, 10, ctx)
    policy.load(root / "split DP1")
    policy.reset_optimizer(optimizer, 10)
    reports = [policy.train_step(packed_for(policy), WeightedNll()) for _ in range(2)]
    return [r[key] for r in reports for key in ("loss/total", "grad_norm")]
