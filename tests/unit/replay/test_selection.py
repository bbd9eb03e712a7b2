"""Selection by hand and by its laws: recalibrate, age, draw, in steps or in bursts."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.config.method import ReplaySection
from megatron_spear.replay.index import ReplayIndex, key_of
from megatron_spear.replay.selection import (
    FULL_FACTOR,
    Selection,
    recalibrated,
    scaled,
    select,
    stored_scale,
)
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import Coefficients, StepContext


def _ctx(*, step: int = 1, seed: int = 0, version: int = 10) -> StepContext:
    coefficients = Coefficients(intrinsic_weight=0.0, replay_weight=1.0)
    return StepContext(step=step, policy_version=version, coefficients=coefficients, seed=seed)


def _index(row_ids: Any, versions: Any = 10) -> ReplayIndex:
    """Rows with these ids, each a trajectory of its own."""
    ids = np.asarray(row_ids, np.int64)
    zeros = {name: np.zeros(len(ids)) for name in ("outcome", "intrinsic", "format", "advantages")}
    return ReplayIndex(
        row_ids=ids,
        policy_versions=np.broadcast_to(np.asarray(versions, np.int64), ids.shape),
        num_tokens=np.ones(len(ids), np.int64),
        prompt_keys=np.zeros(len(ids), np.uint64),
        trajectory_keys=np.array([key_of(f"g/{i}") for i in ids.tolist()], np.uint64),
        **zeros,
    )


def _select(
    advantages: Any,
    ctx: StepContext | None = None,
    index: ReplayIndex | None = None,
    **section: Any,
) -> Selection:
    values = np.asarray(advantages, np.float64)
    index = _index(range(len(values))) if index is None else index
    settings = ReplaySection(**({"rows_per_step": 99, "max_age": 5} | section))
    return select(index, values, ctx or _ctx(), settings)


def _ids(selection: Selection) -> list[int]:
    return selection.row_ids.tolist()


def test_keeps_only_positive_advantages() -> None:
    selection = _select([0.5, 0.0, -0.1, 1.5])
    assert _ids(selection) == [0, 3] and selection.advantages.tolist() == [0.5, 1.5]
    assert selection.metrics["replay/kept_fraction"] == 0.5
    assert selection.metrics["replay/num_candidates"] == 4
    assert selection.metrics["replay/advantage_mean"] == 1.0


def test_what_is_not_a_number_is_never_kept() -> None:
    selection = _select([np.nan, 1.0, np.nan])
    assert _ids(selection) == [1] and selection.metrics["replay/kept_fraction"] == 1 / 3


def test_age_is_measured_at_release() -> None:
    selection = _select([1.0] * 3, _ctx(version=10), _index(range(3), [4, 5, 9]))
    assert _ids(selection) == [1, 2]
    assert selection.metrics["replay/age_mean"] == 3.0
    assert selection.metrics["replay/age_max"] == 5.0
    assert selection.metrics["replay/num_candidates"] == 2


@pytest.mark.parametrize("release", ["continuous", "burst"])
def test_nothing_to_replay(release: str) -> None:
    for index, advantage in ((_index([]), 1.0), (_index([0], 0), 1.0), (_index([0]), -1.0)):
        selection = _select([advantage] * len(index), index=index, release=release)
        assert _ids(selection) == [] and selection.metrics["replay/rows"] == 0


def test_draw_is_limited_uniform_and_keyed() -> None:
    counts = np.zeros(10)
    for step in range(500):
        drawn = _ids(_select([1.0] * 10, _ctx(step=step), rows_per_step=4))
        assert drawn == sorted(set(drawn))
        counts[drawn] += 1
    assert counts.sum() == 2000
    assert abs(counts - 200).max() < 55  # 5 standard deviations
    draws = {
        tuple(_ids(_select([1.0] * 10, _ctx(seed=seed), rows_per_step=4))) for seed in range(20)
    }
    assert len(draws) > 10


def test_pairs_are_drawn_as_often_as_chance_has_it() -> None:
    """Rows do not follow each other: each of 15 pairs of 6 is drawn in 1/15 of the steps."""
    pairs = np.zeros((6, 6))
    for step in range(900):
        first, second = _ids(_select([1.0] * 6, _ctx(step=step), rows_per_step=2))
        pairs[first, second] += 1
    assert abs(pairs[np.triu_indices(6, 1)] - 60).max() < 38  # 5 standard deviations


def test_values_are_pinned() -> None:
    """A changed draw would change what a resumed run replays."""
    assert _ids(_select([1.0] * 20, _ctx(step=3, seed=7), rows_per_step=5)) == PINNED


PINNED = [1, 3, 8, 10, 18]

ROWS = st.lists(
    st.tuples(st.floats(-1e6, 1e6), st.integers(0, 12), st.booleans()), min_size=0, max_size=30
)


@settings(deadline=None)  # the machine may be busy
@given(ROWS, st.integers(1, 8), st.integers(0, 6), st.sampled_from(["continuous", "burst"]))
def test_laws(rows: list[tuple[float, int, bool]], limit: int, max_age: int, release: str) -> None:
    """Never a bad, old or unknown row; no more than asked for; as many as there are."""
    advantages = [np.nan if unknown else value for value, _, unknown in rows]
    versions = [version for _, version, _ in rows]
    selection = _select(
        advantages,
        _ctx(version=12),
        _index(range(len(rows)), versions),
        max_age=max_age,
        release=release,
        rows_per_step=limit,
        capacity=limit,
    )
    drawn = _ids(selection)
    good = {i for i, a in enumerate(advantages) if a > 0.0 and 12 - versions[i] <= max_age}
    assert drawn == sorted(set(drawn)) and set(drawn) <= good
    assert selection.advantages.tolist() == [advantages[i] for i in drawn]
    full = release == "continuous" or len(good) > FULL_FACTOR * limit
    assert len(drawn) == (min(len(good), limit) if full else 0)
    assert selection.metrics["replay/rows"] == len(drawn)


@settings(deadline=None)  # the machine may be busy
@given(st.permutations(range(12)), st.integers(1, 11), st.integers(0, 3))
def test_the_draw_depends_on_each_row_alone(order: list[int], limit: int, step: int) -> None:
    """Neither the order of the rows nor rows that are not kept change it; of fewer rows, those
    drawn before are drawn again."""
    ctx = _ctx(step=step)
    chosen = set(_ids(_select([1.0] * 12, ctx, rows_per_step=limit)))
    assert set(_ids(_select([1.0] * 12, ctx, _index(order), rows_per_step=limit))) == chosen
    others = _index([*range(100, 105), *order])
    advantages = [-1.0] * 5 + [1.0] * 12
    assert set(_ids(_select(advantages, ctx, others, rows_per_step=limit))) == chosen
    some = sorted(chosen | set(order[:3]))
    assert set(_ids(_select([1.0] * len(some), ctx, _index(some), rows_per_step=limit))) == chosen


def test_the_row_id_decides_between_equal_draws() -> None:
    """Two rows of one key: only a clash of 64-bit hashes makes such."""
    for order in ([0, 1, 2], [2, 1, 0]):
        index = _index(order)
        index = ReplayIndex(
            **{name: getattr(index, name) for name in index.__slots__}
            | {"trajectory_keys": np.full(3, 5, np.uint64)}
        )
        drawn = _ids(_select([1.0] * 3, index=index, rows_per_step=2))
        assert sorted(drawn) == [0, 1]


@pytest.mark.parametrize(("num_good", "drawn"), [(0, 0), (9, 0), (13, 0), (14, 9), (40, 9)])
def test_a_burst_waits_and_takes_at_most_the_capacity(num_good: int, drawn: int) -> None:
    """Of 14 kept rows all 9 of the capacity, not a power of two of them."""
    advantages = [1.0] * num_good + [-1.0] * 30
    selection = _select(advantages, release="burst", capacity=9, rows_per_step=1)
    assert len(_ids(selection)) == drawn
    assert max(_ids(selection), default=0) < max(num_good, 1)


@pytest.mark.parametrize(
    ("baseline", "decay", "scale"),
    [("p50", 1.0, None), ("batch_mean", 1.0, None), ("per_prompt", 1.0, None),
     ("none", 1.0, 1.0), ("decay", 0.3, 0.3)],
)  # fmt: skip
def test_only_decay_and_none_keep_stored_advantages(
    baseline: Any, decay: float, scale: float | None
) -> None:
    assert stored_scale(ReplaySection(baseline=baseline, decay=decay)) == scale


def test_recalibrated_changes_the_advantages_alone() -> None:
    sample = make_sample(mask=[0, 1, 0, 1], advantage=3.0)
    (result,) = recalibrated([sample], 0.25)
    assert result.advantages.tolist() == pytest.approx([0, 0.25, 0, 0.25])
    assert result.advantages.dtype == np.float32
    assert result.old_logprobs is sample.old_logprobs


def test_scaled_keeps_what_tokens_differ_by() -> None:
    stored = np.array([0.0, 0.8, -0.2, 0.4], np.float32)
    sample = make_sample(mask=[0, 1, 1, 1], advantages=stored)
    (half,) = scaled([sample], 0.5)
    assert half.advantages.tolist() == pytest.approx([0.0, 0.4, -0.1, 0.2])
    assert half.advantages.dtype == np.float32
    assert half.old_logprobs is sample.old_logprobs
    (same,) = scaled([sample], 1.0)
    assert same.advantages.tolist() == stored.tolist()


def test_no_python_time_by_row() -> None:
    """100,000 rows take some 15 ms; a microsecond of Python a row would show."""
    count = 100_000
    keys = np.arange(count).astype(np.uint64)
    index = ReplayIndex(
        row_ids=np.arange(count),
        policy_versions=np.full(count, 10),
        num_tokens=np.ones(count, np.int64),
        prompt_keys=keys,
        trajectory_keys=keys,
        **{name: np.zeros(count) for name in ("outcome", "intrinsic", "format", "advantages")},
    )
    seconds = []
    for step in range(5):
        started = time.perf_counter()
        select(index, np.ones(count), _ctx(step=step), ReplaySection())
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.1
