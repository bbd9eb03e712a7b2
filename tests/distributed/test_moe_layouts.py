"""Every layout of a mixture of experts gives what one rank gives, expert parallel ones above all.

The same comparison as for dense models, on recorded trajectories; see ``test_layouts``.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_layouts import assert_equal, load_one, run_layouts, worst

from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import tiny_hf_folder

TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"expert_parallel": 2}),
    "DP2": (2, {}),
    "TP2": (2, TP2),
    "TP2, its ranks the experts'": (2, {"expert_parallel": 2, **TP2}),
    "EP2xTP2": (4, {"expert_parallel": 2, **TP2}),
    "EP2, context parallel ranks": (2, {"expert_parallel": 2, "context_parallel": 2}),
    "EP4xTP2xCP2": (4, {"expert_parallel": 4, "context_parallel": 2, **TP2}),
    "EP4": (4, {"expert_parallel": 4, **TP2}),
    "EP2xPP2": (4, {"expert_parallel": 2, "pipeline_parallel": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    tiny_hf_folder(folder, "Qwen3Moe")
    return folder


@cache
def results_of(world_size: int, folder: Path) -> dict[str, Any]:
    names = {k: v for k, (ranks, v) in LAYOUTS.items() if ranks == world_size} or {"one": {}}
    return run_ranks(run_layouts, world_size, folder, names, timeout_s=120)[0]


@cache
def loaded_on_one(folder: Path) -> dict[str, Any]:
    return run_ranks(load_one, 1, folder, list(LAYOUTS), timeout_s=120)[0]


pytestmark = pytest.mark.xdist_group("moe_layouts")


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_rank(name: str, folder: Path) -> None:
    assert_equal(results_of(LAYOUTS[name][0], folder)[name], results_of(1, folder)["one"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_survives_and_loads_on_one_rank(name: str, folder: Path) -> None:
    got = results_of(LAYOUTS[name][0], folder)[name]
    assert worst(got[5], got[4]) == 0.0
    for ranks, _ in LAYOUTS.values():
        results_of(ranks, folder)
    assert worst(loaded_on_one(folder)[name], got[4]) == 0.0
