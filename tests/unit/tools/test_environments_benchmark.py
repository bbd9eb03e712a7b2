"""The benchmark of environments measures what it says, on few tasks."""

import importlib.util
import pickle
import sys
from pathlib import Path

import pytest

from megatron_spear.envs.family import family_of

TOOL = Path(__file__).parents[3] / "tools" / "benchmarks" / "environments.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("environments_benchmark", TOOL)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("name", ["alfworld", "number_game"])
def test_a_row(tool, name):
    case = tool.FAMILIES[name]
    family = family_of(case.section(None))
    factory = tool.Factory(family.factory, dict(family.factory_options))
    played = tool.tasks(family, case, 3)
    assert len(played) == 3 and all(actions for _, actions in played)
    steps, first, again = tool.rates(factory, played, 0.05)
    assert steps > 100 and first > 1 and again > 1
    live = [pickle.dumps(options) for options, _ in played]
    assert -50 < tool.live_memory(factory, live) < 50
