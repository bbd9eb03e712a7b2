"""Every layout of a mixture of experts gives what one rank gives, expert parallel ones above all.

The same comparison as for dense models, on recorded trajectories; see ``test_layouts``.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from layout_matrix import EXPERTS, worst
from test_layouts import assert_equal, load_one, run_layouts

from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import tiny_hf_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    tiny_hf_folder(folder, "Qwen3Moe", num_hidden_layers=4)
    return folder


@cache
def results_of(world_size: int, folder: Path) -> dict[str, Any]:
    names = {k: v for k, (ranks, v) in EXPERTS.items() if ranks == world_size} or {"one": {}}
    return run_ranks(run_layouts, world_size, folder, names, timeout_s=240)[0]


@cache
def loaded_on_one(folder: Path) -> dict[str, Any]:
    return run_ranks(load_one, 1, folder, list(EXPERTS), timeout_s=120)[0]


@pytest.mark.parametrize("name", EXPERTS)
def test_equals_one_rank(name: str, folder: Path) -> None:
    assert_equal(results_of(EXPERTS[name][0], folder)[name], results_of(1, folder)["one"])


@pytest.mark.parametrize("name", EXPERTS)
def test_state_survives_and_loads_on_one_rank(name: str, folder: Path) -> None:
    got = results_of(EXPERTS[name][0], folder)[name]
    assert worst(got[5], got[4]) == 0.0
    for ranks, _ in EXPERTS.values():
        results_of(ranks, folder)
    assert worst(loaded_on_one(folder)[name], got[4]) == 0.0
