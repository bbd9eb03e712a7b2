"""Who shares an optimizer step and what tokens weigh: dealing, replay, drops, corrections."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_spear.config.losses import (
    ClipCovLossSection,
    ClippedLossSection,
    KlCovLossSection,
    KlSection,
    OffPolicyCorrectionSection,
    RatioFilterSection,
)
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.trainer.controller import with_gradient, with_old_logprobs
from megatron_spear.trainer.mini_batches import MiniBatch, MiniBatches, RefLogprobs
from megatron_spear.types import Coefficients, Origin, StepContext, TrainSample, Update

CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
    seed=7,
)
PLAIN = {"loss": ClippedLossSection(), "ratio_filter": None}


def _rules(replay: dict[str, Any] | None = None, **algorithm: Any) -> MiniBatches:
    return MiniBatches(
        algorithm=AlgorithmSection(**({"norm_length": 10} | algorithm)),
        replay=ReplaySection(**(PLAIN | (replay or {}))),
    )


def _batches(
    rules: MiniBatches,
    samples: Sequence[TrainSample],
    active: Sequence[TrainSample] | None = None,
    extra: Sequence[Update] = (),
    current: Sequence[np.ndarray] = (),
    reference: RefLogprobs | None = None,
) -> list[MiniBatch]:
    """All mini-batches; ``current`` are the log-probs of the replayed rows where they are asked."""
    plans = rules.plan(CTX, samples, samples if active is None else active, extra)
    return [
        rules.finish(
            CTX,
            plan,
            [list(current) if rules.needs_current(part) else [] for part in plan.parts],
            reference or {},
        )
        for plan in plans
    ]


def _replay(count: int, weight: float = 0.5) -> Update:
    samples = tuple(make_sample("old", i) for i in range(count))
    return Update(samples=samples, origin=Origin.REPLAY, weight=weight)


@pytest.mark.parametrize(
    ("aggregation", "weight"), [("seq-mean-token-sum-norm", 1 / 30), ("token-mean", 1 / 8)]
)
def test_weights_count_samples_without_gradient_too(aggregation: str, weight: float) -> None:
    samples = [
        make_sample("g", 0, mask=[0, 1, 1]),
        make_sample("g", 1, mask=[0, 1, 1], advantage=0.0),
        make_sample("g", 2, mask=[0, 1, 0, 1, 1, 1], advantage=-2.0),
    ]
    rules = _rules(aggregation=aggregation)
    active = with_gradient(samples)
    assert [s.trajectory_id.member for s in active] == [0, 2]
    (batch,) = _batches(rules, samples, active)
    assert batch.samples == tuple(active)
    assert batch.origins == (Origin.ON_POLICY, Origin.ON_POLICY)
    assert batch.weights[0] == pytest.approx(np.array([0, weight, weight]))
    assert batch.weights[1] == pytest.approx(weight * np.array([0, 1, 0, 1, 1, 1]))
    for weights, own in zip(batch.weights, batch.regularizer_weights, strict=True):
        assert (weights == own).all()
    (full,) = _batches(rules, samples)
    assert full.samples == batch.samples, "what does not move the policy is not trained"


def test_what_is_trained_are_the_active_samples_with_their_final_logprobs() -> None:
    samples = [make_sample("g", i, advantage=i - 1.0) for i in range(3)]
    active = with_old_logprobs(with_gradient(samples), [np.full(3, -2.0), np.full(3, -3.0)])
    (batch,) = _batches(_rules(), samples, active)
    assert [s.old_logprobs.tolist() for s in batch.samples] == [[0, -2, -2], [0, -3, -3]]
    assert batch.metrics == pytest.approx(  # the engine gave -0.5
        {
            "mismatch/logprob_gap_mean": 2.0,
            "mismatch/max_logprob_gap": 2.5,
            "mismatch/effective_sample_fraction": 0.824,
        },
        abs=1e-3,
    )


def _seats(batches: Sequence[MiniBatch]) -> dict[str, int]:
    """Trajectory -> mini-batch; fails where one is in two."""
    found = {(str(s.trajectory_id), i) for i, batch in enumerate(batches) for s in batch.samples}
    assert len(dict(found)) == len(found)
    return dict(found)


def test_several_mini_batches_deal_every_trajectory_exactly_once() -> None:
    samples = [
        make_sample("g", i, segment=part, num_segments=2) for i in range(8) for part in (0, 1)
    ]
    rules = _rules(mini_batches=3)
    batches = _batches(rules, samples)
    dealt = Counter((s.trajectory_id, s.segment) for batch in batches for s in batch.samples)
    assert dealt == Counter((s.trajectory_id, s.segment) for s in samples)
    seats = _seats(batches)
    assert sorted(Counter(seats.values()).values()) == [2, 3, 3]
    for batch in batches:
        trajectories = len(batch.samples) // 2
        for weights in batch.weights:
            assert weights == pytest.approx(np.array([0, 1, 1]) / (10 * trajectories))
    assert _seats(_batches(rules, samples[::-1])) == seats, "the order of arrival decides nothing"
    for other in (replace(CTX, step=4), replace(CTX, seed=8)):
        plans = rules.plan(other, samples, samples, [])
        dealt_otherwise = [rules.finish(other, plan, [[]], {}) for plan in plans]
        assert _seats(dealt_otherwise) != seats


def test_a_mini_batch_counts_its_own_samples_without_gradient() -> None:
    samples = [make_sample("g", i, advantage=float(i == 0)) for i in range(6)]
    (batch,) = _batches(_rules(mini_batches=2), samples, samples[:1])
    (weights,) = batch.weights
    assert weights == pytest.approx(np.array([0, 1, 1]) / (10 * 3))


@pytest.mark.parametrize("count", [1, 2])
def test_replayed_rows_are_scaled_and_normalised_by_their_own_counts(count: int) -> None:
    samples = [make_sample("new", i) for i in range(6)]
    batches = _batches(_rules(mini_batches=count), samples, extra=[_replay(4, weight=0.5)])
    replayed: list[str] = []
    for batch in batches:
        assert len(batch.samples) == 10 // count and batch.scheduled
        rows = batch.of(Origin.REPLAY)
        assert len(rows.samples) == 4 // count
        # gamma * tokens / (rows * norm_length), two tokens a row.
        assert sum(w.sum() for w in rows.weights) == pytest.approx(0.5 * 2 / 10)
        assert not any(w.any() for w in rows.regularizer_weights), (
            "KL and entropy are the new ones'"
        )
        assert sum(w.sum() for w in batch.of(Origin.ON_POLICY).weights) == pytest.approx(0.2)
        replayed += [str(sample.trajectory_id) for sample in rows.samples]
    assert sorted(replayed) == [f"old/{i}" for i in range(4)]


def test_replay_alone_makes_an_update() -> None:
    (batch,) = _batches(_rules(), [], extra=[_replay(2)])
    assert batch.origins == (Origin.REPLAY, Origin.REPLAY)


def test_a_separate_step_comes_after_the_others_and_off_schedule() -> None:
    samples = [make_sample("new", i) for i in range(4)]
    rules = _rules({"combine": "separate_step"}, mini_batches=2)
    batches = _batches(rules, samples, extra=[_replay(2)])
    assert [batch.scheduled for batch in batches] == [True, True, False, False]
    origins = [set(batch.origins) for batch in batches]
    assert origins == [{Origin.ON_POLICY}] * 2 + [{Origin.REPLAY}] * 2
    # the weight is in the loss all the same, as in the official code
    assert sum(w.sum() for b in batches[2:] for w in b.weights) == pytest.approx(2 * 0.5 * 0.2)


def _moved(update: Update, current: Sequence[np.ndarray]) -> Update:
    return replace(update, samples=tuple(with_old_logprobs(update.samples, current)))


def test_covariance_dropped_tokens_have_weight_0_and_the_rest_keep_theirs() -> None:
    # Means -8 and 2: the covariances are 2.5, 2.5, -2.5 and 7.5; only the last is in the band.
    current = [np.array([0, -10.5, -10.5]), np.array([0, -10.5, -0.5])]
    rows = (make_sample("old", 0, advantage=1.0), make_sample("old", 1, advantage=3.0))
    update = _moved(Update(samples=rows, origin=Origin.REPLAY, weight=0.5), current)
    rules = _rules({"loss": ClipCovLossSection(fraction=0.02, low=5.0, high=60.0)})
    (batch,) = _batches(rules, [], extra=[update], current=current)
    kept = 0.5 / (2 * 10)
    assert batch.weights[0] == pytest.approx(np.array([0, kept, kept]))
    assert batch.weights[1] == pytest.approx(np.array([0, kept, 0]))
    assert batch.metrics == {"replay/cov_dropped_fraction": 0.25}


def test_on_policy_covariance_reads_old_logprobs_before_the_first_update() -> None:
    rows = [make_sample("g", 0, advantage=1.0), make_sample("g", 1, advantage=3.0)]
    active = with_old_logprobs(rows, [np.array([0, -10.5, -10.5]), np.array([0, -10.5, -0.5])])
    rules = _rules(loss=ClipCovLossSection(fraction=0.02, low=5.0, high=60.0))
    (plan,) = rules.plan(CTX, rows, active, [])
    assert rules.moves_all and not rules.needs_current(plan.parts[0])
    batch = rules.finish(CTX, plan, [[]], {})
    assert batch.weights[1][2] == 0.0 and batch.regularizer_weights[1][2] > 0.0
    assert batch.metrics["policy/cov_dropped_fraction"] == 0.25
    both = replace(rules, algorithm=rules.algorithm.model_copy(update={"mini_batches": 2}))
    asked = [both.needs_current(p) for plan in both.plan(CTX, rows, active, []) for p in plan.parts]
    assert asked == [False, True], "after an update old_logprobs are no longer current"


@pytest.mark.parametrize(("version", "asked"), [(2, False), (1, True)])
def test_covariance_of_engine_logprobs_of_an_earlier_version_asks_the_policy(
    version: int, asked: bool
) -> None:
    rows = [make_sample("g", 0, policy_version=2), make_sample("g", 1, policy_version=version)]
    loss = ClipCovLossSection(fraction=0.02, low=5.0, high=60.0)
    for settings, expected in (("engine", asked), ("policy", False)):
        rules = _rules(loss=loss, old_logprobs=settings)
        ((part,),) = [plan.parts for plan in rules.plan(CTX, rows, rows, [])]
        assert rules.needs_current(part) is expected
    assert not _rules(old_logprobs="engine").needs_current(part), "without covariance none is read"


def test_kl_cov_marks_the_tokens_of_highest_covariance() -> None:
    current = [np.array([0, -10.5, -10.5]), np.array([0, -10.5, -0.5])]
    rows = (make_sample("old", 0, advantage=1.0), make_sample("old", 1, advantage=3.0))
    update = _moved(Update(samples=rows, origin=Origin.REPLAY, weight=0.5), current)
    rules = _rules({"loss": KlCovLossSection(fraction=0.25)})
    (batch,) = _batches(rules, [], extra=[update], current=current)
    assert [row.tolist() for row in batch.kl_selected] == [[False] * 3, [False, False, True]]
    assert all(w[1:].all() for w in batch.weights)


def test_rows_the_policy_has_left_are_left_out_and_not_counted() -> None:
    update = _replay(3)  # old log-probs -0.5
    current = [np.array([0, -0.5, -0.5]), np.array([0, -1.5, -1.5]), np.array([0, -0.4, -0.6])]
    rules = _rules({"ratio_filter": RatioFilterSection(low=0.5, high=2.0)})
    (batch,) = _batches(rules, [], extra=[update], current=current)
    assert [s.trajectory_id.member for s in batch.samples] == [0, 2]  # exp(-1) = 0.37 is below 0.5
    assert batch.weights[0] == pytest.approx(np.array([0, 1, 1]) * 0.5 / (2 * 10))
    assert batch.metrics["replay/ratio_dropped_fraction"] == pytest.approx(1 / 3)


def test_off_policy_correction_multiplies_the_weights_but_not_the_regularizers() -> None:
    engine, policy = [0.0, -1.0, -1.0], np.array([0, -1.0, -1.0 + np.log(4)])
    (sample,) = with_old_logprobs(
        [make_sample("g", 0, rollout_logprobs=np.array(engine, np.float32))], [policy]
    )
    section = OffPolicyCorrectionSection(mode="token-truncate", high=2.0)
    (batch,) = _batches(_rules(off_policy_correction=section), [sample])
    assert batch.weights[0] == pytest.approx(np.array([0, 1, 2]) / 10)
    assert batch.regularizer_weights[0] == pytest.approx(np.array([0, 1, 1]) / 10)
    assert batch.metrics["mismatch/truncated_fraction"] == 0.5
    (plain,) = _batches(_rules(old_logprobs="engine"), [sample])
    assert plain.metrics == {}, "nothing was compared"


def test_reference_logprobs_reach_their_own_sample() -> None:
    samples = [make_sample("g", i) for i in range(3)]
    reference = {(s.trajectory_id, s.segment): np.full(3, -float(i)) for i, s in enumerate(samples)}
    rules = _rules(kl=KlSection(coef=0.1), mini_batches=3)
    assert rules.moves_all
    for batch in _batches(rules, samples, reference=reference):
        ((sample,), (values,)) = batch.samples, batch.ref_logprobs
        assert values.tolist() == [-float(sample.trajectory_id.member)] * 3
