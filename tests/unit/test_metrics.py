"""Merging the metric records of parts of a step: sums, maxima and means by name."""

import math

import pytest

from megatron_spear.metrics import is_metric, is_number, merge, phases, speeds


def test_the_last_part_of_the_name_decides() -> None:
    merged = merge(
        [
            {"loss/policy": 1.0, "data/num_rows": 2, "train/tokens": 10, "kl/max_ratio": 3.0},
            {"loss/policy": 3.0, "data/num_rows": 4, "train/tokens": 5, "kl/max_ratio": 2.0},
        ]
    )
    assert merged == {
        "loss/policy": 2.0,
        "data/num_rows": 6.0,
        "train/tokens": 15.0,
        "kl/max_ratio": 3.0,
    }


def test_only_the_documented_forms_are_summed() -> None:
    one = {"a/action_tokens": 2.0, "a/tokens_per_s": 2.0, "num_a/mean": 2.0, "a/sum_num": 2.0}
    assert merge([one, one]) == {
        "a/action_tokens": 4.0,
        "a/tokens_per_s": 2.0,
        "num_a/mean": 2.0,
        "a/sum_num": 2.0,
    }


def test_a_metric_of_some_parts_is_averaged_over_those() -> None:
    assert merge([{"replay/kl": 4.0}, {}, {"replay/kl": 2.0, "x": 1}]) == {"replay/kl": 3, "x": 1}
    assert merge([]) == {}


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, [1.0]])
def test_what_is_no_finite_number_is_no_metric(value: object) -> None:
    assert not is_metric("reward/mean", value) and not is_number(value)
    assert is_metric("reward/mean", 0.5) and is_metric("replay/rows", 3)
    assert not is_metric("step", 3) and not is_metric("time", 1e9)


def test_a_step_and_an_evaluation_are_no_phases_of_a_step() -> None:
    names = [
        "time/train_s",
        "time/step_s",
        "time/eval_s",
        "time/weight_sync_s",
        "time",
        "train/x_s",
    ]
    assert phases([*names, *names]) == ["train", "weight_sync"]


def test_a_speed_needs_its_tokens_and_its_time() -> None:
    record = {"rollout/action_tokens": 1000, "time/rollout_s": 4.0, "time/step_s": 0.0}
    assert speeds(record) == {"rollout": 250.0}
    assert speeds({"train/tokens": None, "time/train_s": 2.0}) == {}
    assert speeds({"train/tokens": 0, "time/train_s": 2.0}) == {"train": 0.0}
