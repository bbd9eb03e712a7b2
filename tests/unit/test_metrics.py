"""Merging the metric records of parts of a step: sums, maxima and means by name."""

from megatron_spear.metrics import merge


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
