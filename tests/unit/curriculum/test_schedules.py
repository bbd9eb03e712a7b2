"""The schedules against hand numbers, and the coefficients read from them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spear.config.method import CurriculumSection
from megatron_spear.curriculum.coefficients import coefficients
from megatron_spear.curriculum.schedules import (
    DECAYS,
    WARMUPS,
    cosine_decay,
    cosine_warmup,
    linear_decay,
    linear_warmup,
)

HORIZONS = st.integers(0, 500)
MOVING = ("linear", "cosine")


def test_warmup_by_hand() -> None:
    values = [cosine_warmup(step, 4) for step in range(6)]
    half_root = math.sqrt(0.5)
    assert values == pytest.approx([0, (1 - half_root) / 2, 0.5, (1 + half_root) / 2, 1, 1])


def test_decay_mirrors_warmup() -> None:
    for step in range(30):
        assert cosine_decay(step, 20) == pytest.approx(1 - cosine_warmup(step, 20))


def test_linear_by_hand() -> None:
    assert [linear_warmup(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [linear_decay(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize("shape", MOVING)
@given(steps=HORIZONS)
def test_a_warmup_rises_and_a_decay_falls_from_end_to_end(shape: str, steps: int) -> None:
    up = [WARMUPS[shape](step, steps) for step in range(steps + 3)]
    down = [DECAYS[shape](step, steps) for step in range(steps + 3)]
    assert up == sorted(up) and down == sorted(down, reverse=True)
    assert all(0.0 <= share <= 1.0 for share in up + down)
    if steps:
        assert (up[0], down[0]) == (0.0, 1.0)
    assert up[steps:] == [1.0] * 3 and down[steps:] == [0.0] * 3
    assert [a + b for a, b in zip(up, down, strict=True)] == pytest.approx([1.0] * len(up))


@given(step=st.integers(0, 1000), steps=HORIZONS)
def test_constant_is_full_whatever_the_horizon(step: int, steps: int) -> None:
    assert WARMUPS["constant"](step, steps) == DECAYS["constant"](step, steps) == 1.0


@given(share=st.floats(0.01, 0.49))
def test_a_cosine_starts_slower_than_a_line_and_catches_up(share: float) -> None:
    step = round(share * 1000)
    assert cosine_warmup(step, 1000) < linear_warmup(step, 1000)
    assert cosine_warmup(1000 - step, 1000) > linear_warmup(1000 - step, 1000)


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


def test_each_weight_follows_its_own_schedule() -> None:
    section = CurriculumSection(
        replay_schedule="linear",
        replay_weight=2.0,
        replay_warmup_steps=10,
        intrinsic_schedule="constant",
        intrinsic_weight=0.5,
        intrinsic_decay_steps=10,
    )
    found = [coefficients(step, section) for step in (1, 5, 10, 11)]
    assert [c.replay_weight for c in found] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert [c.intrinsic_weight for c in found] == [0.5] * 4
