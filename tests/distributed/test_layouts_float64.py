"""In float64 the loss and the gradient of one update are the same at every layout, to 1e-10.

Users have no float64: Megatron's Adam refuses it, but for a gradient none is needed.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_layouts import DISTRIBUTED, LAYOUTS, exported_gradient

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder

GRADIENTS = {name: layout for name, layout in LAYOUTS.items() if name not in DISTRIBUTED}
"""A distributed optimizer leaves the gradient in pieces."""


def run_float64(folder: Path, layouts: list[dict[str, Any]]) -> list[Any]:
    """On every rank: each layout's loss over all ranks, and the gradient by name."""
    from megatron_spear.policy import exchange, model, parallel
    from megatron_spear.policy import policy as module

    model.DTYPES["fp32"] = torch.float64
    settings = module.DistributedDataParallelConfig
    module.DistributedDataParallelConfig = lambda **changes: settings(
        **changes | {"grad_reduce_in_fp32": False}
    )
    found = []
    for changes in layouts:
        section = PolicySection(**changes)
        ctx = parallel.initialize(section, seed=0, timeout_s=60)
        policy = module.MegatronPolicy.from_hf(folder, section, OptimizerSection(), 10, ctx)
        packed, loss = None, None
        if ctx.is_controller:
            packed = pack(
                *random_samples(),
                data_parallel=ctx.data_size,
                tokens_per_microbatch=150,
                pad_multiple=policy.pad_multiple,
                sequence_multiple=policy.sequence_multiple,
                microbatch_multiple=policy.microbatch_multiple,
                dtype=np.float64,
            )
            loss = PolicyLoss.from_sections(
                AlgorithmSection(entropy_coef=0.01), ReplaySection().loss, temperature=0.9
            )
        batches, loss = exchange.scatter(packed, loss, ctx)
        sums = exchange.all_sum(policy.compute_gradient(batches, loss), ctx)
        found.append((sums["loss/total"], exported_gradient(policy)))
        parallel.destroy(keep_world=True)
    return found


@cache
def results_of(ranks: int, folder: Path) -> dict[str, Any]:
    layouts = {n: v for n, (count, v) in GRADIENTS.items() if count == ranks} or {"one": {}}
    found = run_ranks(run_float64, ranks, folder, list(layouts.values()), timeout_s=120)[0]
    return dict(zip(layouts, found, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float64")
    tiny_hf_folder(folder, num_hidden_layers=4, tie_word_embeddings=True)
    return folder


pytestmark = pytest.mark.xdist_group("float64")


@pytest.mark.parametrize("name", GRADIENTS)
def test_loss_and_gradient_equal_one_rank(name: str, folder: Path) -> None:
    loss, gradient = results_of(1, folder)["one"]
    got_loss, got = results_of(GRADIENTS[name][0], folder)[name]
    assert abs(got_loss - loss) < 1e-10 * abs(loss) and abs(loss) > 1e-3
    assert set(got) == set(gradient)
    for key, expected in gradient.items():
        assert expected.dtype == np.float64 and np.linalg.norm(expected) > 0
        difference = np.linalg.norm(got[key] - expected) / np.linalg.norm(expected)
        assert difference < 1e-10, f"gradient of {key} differs by {difference}"
