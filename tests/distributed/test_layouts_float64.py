"""In float64 one update of the method is the same at every layout and packing, to 1e-10: loss,
gradient, and which tokens covariance clipping drops.

The update is that of ``test_invariance``, new and replayed trajectories with clip_cov, KL and
entropy bonus, here with Megatron's models; log-probs of the present weights come from the layout
under test. Users have no float64: Megatron's Adam refuses it, but for a gradient none is needed.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_matrix import DENSE, EXPERTS, exported_gradient
from test_invariance import LOSSES, finished, marks_of, method, packed_batch, planned

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import tiny_hf_folder
from megatron_spear.types import Origin

TEMPERATURE = 0.9
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen3", {"tie_word_embeddings": True}),
    "untied": ("Qwen2", {}),
    "experts": ("Qwen3Moe", {}),
}
PACKINGS: dict[str, dict[str, int]] = {
    "some": {"tokens_per_microbatch": 150},
    "padded": {"tokens_per_microbatch": 90, "pad_multiple": 32},
    "one sequence at a time": {"tokens_per_microbatch": 1},
    "all at once": {"tokens_per_microbatch": 100_000},
}
UNTIED = (
    "TP2",
    "PP2",
    "TP2xPP2xVPP2+SP, recompute",
    "TP2xDP2+SP, distributed, overlapped, recompute",
)


def cases() -> dict[tuple[str, str, str], tuple[int, dict[str, Any]]]:
    """(model, layout, packing) -> ranks and ``policy.*``: one rank with all packings, each layout
    with one of them, in turn."""
    found: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = {}
    untied = {name: DENSE[name] for name in UNTIED}
    for model, layouts in (("tied", DENSE), ("untied", untied), ("experts", EXPERTS)):
        for packing in PACKINGS:
            found[model, "one", packing] = (1, {})
        for number, (name, layout) in enumerate(layouts.items()):
            found[model, name, list(PACKINGS)[number % len(PACKINGS)]] = layout
    return found


CASES = cases()


class NoOptimizer:
    """In place of Megatron's, whose Adam refuses float64."""

    def zero_grad(self) -> None: ...


def run_float64(root: Path, jobs: list[tuple[str, dict[str, Any], dict[str, int]]]) -> list[Any]:
    """On every rank, for each (model, layout, packing): the loss over all ranks, the gradient by
    name, and what is dropped."""
    from megatron_spear.policy import model, parallel
    from megatron_spear.policy import policy as module

    model.DTYPES["fp32"] = torch.float64
    experts_config = model.experts_config
    model.experts_config = lambda *sizes: experts_config(*sizes) | {"moe_router_dtype": "fp64"}
    settings = module.DistributedDataParallelConfig
    module.DistributedDataParallelConfig = lambda **changes: settings(
        **changes | {"grad_reduce_in_fp32": False, "bucket_size": 20_000}
    )
    module.build_optimizer = lambda *args: NoOptimizer()
    found = []
    for folder, changes, packing in jobs:
        section = PolicySection(**changes)
        ctx = parallel.initialize(section, seed=0, timeout_s=60)
        policy = module.MegatronPolicy.from_hf(root / folder, section, OptimizerSection(), 10, ctx)
        found.append(updated(policy, packing))
        parallel.destroy(keep_world=True)
    return found


def updated(policy: Any, packing: dict[str, int]) -> Any:
    """(loss, gradient, marks) of the method's update on this layout; collective."""
    from megatron_spear.policy import exchange

    ctx = policy.ctx
    settings = {
        "data_parallel": ctx.data_size,
        "pad_multiple": policy.pad_multiple,
        "sequence_multiple": policy.sequence_multiple,
        "microbatch_multiple": policy.microbatch_multiple,
        **packing,
    }
    algorithm, replay = LOSSES["clip_cov"]
    rules = method(algorithm, replay | {"ratio_filter": None})  # no model is near the old log-probs
    plan = planned(rules)
    replayed = plan.parts[1].trained
    assert [rules.needs_current(part) for part in plan.parts] == [False, True]
    rows = replayed, [np.zeros(len(s.token_ids)) for s in replayed], [Origin.REPLAY] * len(replayed)
    packed = pack(*rows, **settings) if ctx.is_controller else None
    logprobs = policy.logprobs(packed, TEMPERATURE)
    step = loss = marks = None
    if ctx.is_controller:
        batch = finished(rules, plan, [[], logprobs])
        step, marks = packed_batch(batch, **settings), marks_of(batch)
        loss = PolicyLoss.from_sections(rules.algorithm, rules.replay.loss, temperature=TEMPERATURE)
    batches, loss = exchange.scatter(step, loss, ctx)
    sums = exchange.all_sum(policy.compute_gradient(batches, loss), ctx)
    return sums["loss/total"], exported_gradient(policy), marks


@cache
def results_of(ranks: int, root: Path) -> dict[tuple[str, str, str], Any]:
    jobs = {
        (model, name, packing): (model, layout, PACKINGS[packing])
        for (model, name, packing), (count, layout) in CASES.items()
        if count == ranks
    }
    found = run_ranks(run_float64, ranks, root, list(jobs.values()), timeout_s=240)[0]
    return dict(zip(jobs, found, strict=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("float64")
    for name, (architecture, changes) in MODELS.items():
        tiny_hf_folder(root / name, architecture, num_hidden_layers=4, **changes)
    return root


@pytest.mark.parametrize(("model", "layout", "packing"), CASES)
def test_the_update_equals_that_of_one_rank(
    model: str, layout: str, packing: str, root: Path
) -> None:
    loss, gradient, marks = results_of(1, root)[model, "one", "some"]
    ranks, _ = CASES[model, layout, packing]
    got_loss, got, got_marks = results_of(ranks, root)[model, layout, packing]
    assert abs(got_loss - loss) < 1e-10 * abs(loss) and abs(loss) > 1e-3
    assert set(got) == set(gradient)
    for key, expected in gradient.items():
        assert expected.dtype == np.float64 and np.linalg.norm(expected) > 0
        difference = np.linalg.norm(got[key] - expected) / np.linalg.norm(expected)
        assert difference < 1e-10, f"gradient of {key} differs by {difference}"
    assert got_marks == marks
    assert sum(len(dropped) for dropped, _ in marks.values()) >= 4
