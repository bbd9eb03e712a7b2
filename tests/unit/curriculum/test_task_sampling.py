"""Which buckets are drawn, by hand and whatever was measured."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spear.config.method import TaskSamplingSection
from megatron_spear.curriculum.task_sampling import TaskSampler, bucket_shares
from megatron_spear.errors import ConfigError

SUCCESS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8)


def _sampler(buckets: str = "abc", decay: float = 0.5, min_share: float = 0.1) -> TaskSampler:
    section = TaskSamplingSection(enabled=True, decay=decay, min_share=min_share)
    return TaskSampler(tuple(buckets), section)


def test_shares_by_hand() -> None:
    found = bucket_shares(np.array([0.5, 0.9, 1.0]), 0.1)
    assert found.tolist() == pytest.approx([0.1 + 0.7 * 25 / 34, 0.1 + 0.7 * 9 / 34, 0.1])
    assert bucket_shares(np.array([0.0, 1.0]), 0.1).tolist() == [0.5, 0.5], "no signal anywhere"
    assert bucket_shares(np.array([0.0, 0.5]), 0.0).tolist() == [0.0, 1.0]
    assert bucket_shares(np.array([0.1, 0.5]), 0.5).tolist() == [0.5, 0.5]


@given(success=SUCCESS, floor=st.floats(0.0, 1.0))
def test_no_bucket_starves(success: list[float], floor: float) -> None:
    min_share = floor / len(success)
    shares = bucket_shares(np.array(success), min_share)
    assert shares.sum() == pytest.approx(1.0) and (shares >= min_share - 1e-12).all()
    signal = [p * (1 - p) for p in success]
    ranked = sorted(range(len(success)), key=signal.__getitem__)
    assert (np.diff(shares[ranked]) >= -1e-12).all(), "more signal, at least as large a share"


def test_older_attempts_count_less() -> None:
    sampler = _sampler()
    assert sampler.success == {} and sampler.shares == pytest.approx(dict.fromkeys("abc", 1 / 3))
    sampler.measure({"a": [True, True, False, False], "b": [False]})
    assert sampler.success == {"a": 0.5, "b": 0.0}
    sampler.measure({"a": [True] * 4})
    assert sampler.success == {"a": pytest.approx(5 / 6), "b": 0.0}
    # a: 5/36; b: 0; c, of which nothing is known: 1/4
    assert sampler.shares == pytest.approx(
        {"a": 0.1 + 0.7 * 5 / 14, "b": 0.1, "c": 0.1 + 0.7 * 9 / 14}
    )


def test_without_decay_all_attempts_count_alike() -> None:
    sampler = _sampler(decay=1.0)
    for won in ([True], [False, False], [True]):
        sampler.measure({"a": won})
    assert sampler.success == {"a": 0.5}


def test_a_step_in_which_nothing_could_be_measured_changes_no_success() -> None:
    sampler = _sampler()
    sampler.measure({"a": [True, False], "b": []})
    before = sampler.shares
    sampler.measure({})
    assert sampler.success == {"a": 0.5} and sampler.shares == before


@given(success=SUCCESS, floor=st.floats(0.0, 1.0))
def test_picks_follow_the_shares(success: list[float], floor: float) -> None:
    """Evenly spread numbers: each bucket gets its share of them to the nearest one."""
    count, buckets = 500, "abcdefgh"[: len(success)]
    sampler = _sampler(buckets, min_share=floor / len(success))
    sampler.measure(
        {b: [i < round(p * 10) for i in range(10)] for b, p in zip(buckets, success, strict=True)}
    )
    found = Counter(sampler.pick((np.arange(count) + 0.5) / count))
    for bucket, share in sampler.shares.items():
        assert abs(found[bucket] - share * count) <= 1.0 + 1e-6


def test_the_ends_of_the_interval_pick_the_outer_buckets() -> None:
    sampler = _sampler()
    assert sampler.pick(np.array([0.0, 1.0 - 2.0**-53])) == ["a", "c"]
    never = _sampler("ab", min_share=0.0)
    never.measure({"a": [True], "b": [True, False]})
    assert never.shares == {"a": 0.0, "b": 1.0} and never.pick(np.array([0.0])) == ["b"]


def test_state_survives_json_exactly() -> None:
    one = _sampler(decay=0.9)
    for step in range(30):
        one.measure({"a": [step % 3 == 0], "b": [step % 7 == 0] * 3})
    two = _sampler(decay=0.9)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict() and two.shares == one.shares
    one.measure({"c": [True]})
    assert two.state_dict() != one.state_dict(), "nothing is shared"


def test_more_than_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_share: got 0\.4 for 3 buckets.*at most 0\.333"):
        _sampler(min_share=0.4)


def test_attempts_at_unknown_buckets_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="no buckets"):
        _sampler().measure({"x": [True]})
