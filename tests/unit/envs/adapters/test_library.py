"""Missing libraries are told with their extra, and draws of one environment stay its own."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_spear.config.environments.adapters import (
    GemSection,
    GymnasiumSection,
    ReasoningGymSection,
    SkyrlGymSection,
    VerifiersSection,
)
from megatron_spear.envs.adapters.library import _EXTRAS, OwnChance
from megatron_spear.envs.family import family_of
from megatron_spear.errors import ConfigError


@pytest.mark.parametrize(
    ("section", "extra"),
    [
        (GemSection(id="game:Wordle-v0"), "gem"),
        (GymnasiumSection(id="FrozenLake-v1"), "gymnasium"),
        (ReasoningGymSection(datasets={"chain_sum": {"min_terms": 4}}), "reasoning-gym"),
        (SkyrlGymSection(id="gsm8k", train_file="a", eval_file="b"), "skyrl-gym"),
        (VerifiersSection(taskset="wordle"), "verifiers"),
    ],
)
def test_a_missing_library_is_told_with_its_extra(section, extra, monkeypatch):
    monkeypatch.delitem(sys.modules, section.type, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"env.type={section.type} needs .*spear\[{extra}\]"):
        family_of(section)


def test_the_extras_are_those_of_the_package():
    text = (Path(__file__).parents[4] / "setup.py").read_text()
    for extra in _EXTRAS.values():
        assert f'"{extra}": [' in text


def _draws(chance, count, seed=None):
    with chance.drawn(seed):
        return [(random.random(), float(np.random.rand())) for _ in range(count)]


def test_interleaved_draws_are_those_of_one_alone():
    alone = OwnChance()
    expected = _draws(alone, 2, seed=7) + _draws(alone, 3)
    one, other = OwnChance(), OwnChance()
    got = _draws(one, 2, seed=7)
    _draws(other, 5, seed=8)
    random.random()
    got += _draws(one, 3)
    assert got == expected


def test_outside_nothing_is_drawn():
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), float(np.random.RandomState(1).rand())
    _draws(OwnChance(), 4, seed=3)
    assert (random.random(), float(np.random.rand())) == expected
