"""The schedules against hand numbers, and the coefficients read from them."""

import math

import pytest

from megatron_spear.config.method import CurriculumSection
from megatron_spear.curriculum.coefficients import coefficients
from megatron_spear.curriculum.schedules import cosine_decay, cosine_warmup


def test_warmup_by_hand() -> None:
    values = [cosine_warmup(step, 4) for step in range(6)]
    half_root = math.sqrt(0.5)
    assert values == pytest.approx([0, (1 - half_root) / 2, 0.5, (1 + half_root) / 2, 1, 1])


def test_decay_mirrors_warmup() -> None:
    for step in range(30):
        assert cosine_decay(step, 20) == pytest.approx(1 - cosine_warmup(step, 20))


def test_ends_are_exact() -> None:
    assert cosine_warmup(7, 7) == 1.0 and cosine_warmup(8, 7) == 1.0
    assert cosine_decay(7, 7) == 0.0 and cosine_decay(8, 7) == 0.0


def test_no_horizon() -> None:
    assert cosine_warmup(1, 0) == 1.0
    assert cosine_decay(1, 0) == 0.0


def test_coefficients_scale_the_schedules() -> None:
    section = CurriculumSection(
        replay_weight=2.0, replay_warmup_steps=4, intrinsic_weight=3.0, intrinsic_decay_steps=4
    )
    middle = coefficients(2, section)
    assert middle.replay_weight == pytest.approx(1.0)
    assert middle.intrinsic_weight == pytest.approx(1.5)
    late = coefficients(100, section)
    assert (late.replay_weight, late.intrinsic_weight) == (2.0, 0.0)


def test_coefficients_docstring_example() -> None:
    at_ten = coefficients(10, CurriculumSection())
    assert at_ten.intrinsic_weight == pytest.approx(0.5)
    assert at_ten.replay_weight == pytest.approx(0.75)
