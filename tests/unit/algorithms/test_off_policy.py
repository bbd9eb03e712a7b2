"""Engine-trainer correction: multipliers and metrics by hand, segments, and what is not finite."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_spear.algorithms.off_policy import correction_weights, effective_sample_fraction
from megatron_spear.errors import ConfigError, EngineError
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import TrainSample


def _sample(weights: list[float | None], member: int = 0, **changes: int) -> TrainSample:
    """A sample with these importance weights; None is a token outside the mask."""
    mask = [weight is not None for weight in weights]
    old = [math.log(weight) - 1 if weight is not None else 0.0 for weight in weights]
    sample = make_sample(member=member, mask=mask, **changes)
    return replace(
        sample,
        old_logprobs=np.array(old, np.float32),
        rollout_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
    )


def _weights(samples: list[TrainSample], mode: str, **bounds: float) -> list[list[float]]:
    rows, _ = correction_weights(samples, mode, **({"high": 2.0} | bounds))
    assert all(row.dtype == np.float64 for row in rows)
    return [row.tolist() for row in rows]


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("token-truncate", [1, 0.5, 1, 2], [0.25, 1.5]),
        ("token-mask", [1, 0, 1, 0], [0, 1.5]),
        ("sequence-truncate", [1, 2, 2, 2], [0.375, 0.375]),
        ("sequence-mask", [1, 2, 2, 2], [0, 0]),
    ],
)
def test_by_hand(mode: str, first: list[float], second: list[float]) -> None:
    samples = [_sample([None, 0.5, 1.0, 4.0 - 1e-5]), _sample([0.25, 1.5], member=1)]
    got = _weights(samples, mode, low=0.8)
    assert got[0] == pytest.approx(first, rel=1e-5)
    assert got[1] == pytest.approx(second, rel=1e-5)


def test_segments_of_a_trajectory_are_one_sequence() -> None:
    parts = [
        _sample([2.0, None], segment=0, num_segments=2),
        _sample([None, 3.0], segment=1, num_segments=2),
    ]
    assert np.ravel(_weights(parts, "sequence-truncate", high=10.0)) == pytest.approx([6, 1, 1, 6])
    assert np.ravel(_weights(parts, "sequence-mask", high=5.0)) == pytest.approx([0, 1, 1, 0])
    assert np.ravel(_weights(parts, "token-truncate", high=5.0)) == pytest.approx([2, 1, 1, 3])


def test_only_the_masks_read_low() -> None:
    assert _weights([_sample([0.1])], "token-truncate", low=0.5)[0] == pytest.approx([0.1])


def test_agreement_changes_nothing() -> None:
    for mode in ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask"):
        rows, metrics = correction_weights([make_sample()], mode, high=1.0, low=1.0)
        assert rows[0].tolist() == [1, 1, 1]
        share = "mismatch/truncated_fraction" if "truncate" in mode else "mismatch/masked_fraction"
        assert metrics == {
            "mismatch/logprob_gap_mean": 0.0,
            "mismatch/max_logprob_gap": 0.0,
            "mismatch/effective_sample_fraction": 1.0,
            share: 0.0,
        }


def test_metrics_by_hand() -> None:
    samples = [_sample([None, 1.0, 3.0]), _sample([1.0, 3.0], member=1)]
    _, metrics = correction_weights(samples, "token-truncate", high=2.0)
    assert metrics["mismatch/logprob_gap_mean"] == pytest.approx(math.log(3) / 2, rel=1e-6)
    assert metrics["mismatch/max_logprob_gap"] == pytest.approx(math.log(3), rel=1e-6)
    assert metrics["mismatch/effective_sample_fraction"] == pytest.approx(0.8, rel=1e-6)
    assert metrics["mismatch/truncated_fraction"] == 0.5
    samples.append(_sample([9.0, 1.0, 1.0, 1.0], member=2))
    _, metrics = correction_weights(samples, "sequence-mask", high=4.0)
    # trajectories weigh 3, 3 and 9: 15^2 / (3 * 99); the third one's four tokens are masked
    assert metrics["mismatch/effective_sample_fraction"] == pytest.approx(225 / 297, rel=1e-6)
    assert metrics["mismatch/masked_fraction"] == pytest.approx(4 / 8)


def test_effective_sample_fraction() -> None:
    assert effective_sample_fraction(np.array([1.0, 3.0])) == pytest.approx(0.8)
    assert effective_sample_fraction(np.array([5.0, 0.0, 0.0, 0.0])) == 0.25
    assert effective_sample_fraction(np.full(3, 1e300)) == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["token-truncate", "sequence-mask"])
def test_nothing_trained(mode: str) -> None:
    assert correction_weights([], mode, high=2.0) == ([], {})
    rows, metrics = correction_weights([make_sample(mask=[0, 0])], mode, high=2.0)
    assert rows[0].tolist() == [1, 1] and metrics == {}
    samples = [make_sample(mask=[0, 0]), _sample([1.0], member=1)]
    assert correction_weights(samples, mode, high=2.0)[1]["mismatch/max_logprob_gap"] == 0.0


def _set(sample: TrainSample, at: int, *, old: float, rollout: float) -> TrainSample:
    olds, rollouts = sample.old_logprobs.copy(), sample.rollout_logprobs.copy()
    olds[at], rollouts[at] = old, rollout
    return replace(sample, old_logprobs=olds, rollout_logprobs=rollouts)


def test_what_is_outside_the_mask_is_not_read() -> None:
    sample = _set(_sample([None, 1.5]), 0, old=math.nan, rollout=math.inf)
    for mode in ("token-mask", "sequence-truncate"):
        assert _weights([sample], mode)[0] == pytest.approx([1, 1.5])


def test_a_probability_of_zero_on_one_side_is_a_weight_far_out() -> None:
    with np.errstate(all="raise"):
        never = _set(_sample([1.0, 1.0]), 0, old=-math.inf, rollout=-1.0)
        always = _set(_sample([1.0, 1.0]), 0, old=-1.0, rollout=-math.inf)
        assert _weights([never], "token-truncate")[0] == pytest.approx([math.exp(-20), 1])
        assert _weights([always], "token-truncate")[0] == [2, 1]
        assert _weights([always], "sequence-mask")[0] == [0, 0]
        both = _set(never, 1, old=-1.0, rollout=-math.inf)
        assert np.isfinite(_weights([both], "sequence-truncate")[0]).all()
        _, metrics = correction_weights([never], "token-mask", high=2.0)
    assert metrics["mismatch/max_logprob_gap"] == math.inf


@pytest.mark.parametrize(
    ("old", "rollout"),
    [(math.nan, -1.0), (-1.0, math.nan), (math.inf, -1.0), (-math.inf, -math.inf)],
)
def test_log_probs_that_cannot_be_compared_are_an_error(old: float, rollout: float) -> None:
    sample = _set(_sample([None, 1.0, 1.0]), 2, old=old, rollout=rollout)
    with pytest.raises(EngineError, match="token 2"):
        correction_weights([sample], "token-truncate", high=2.0)


@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [
        ("tis", 0.0, 2.0),
        ("token-mask", 0.5, 0.9),
        ("token-mask", 1.1, 2.0),
        ("token-mask", -0.1, 2.0),
        ("token-truncate", 0.0, math.inf),
        ("token-truncate", math.nan, 2.0),
    ],
)
def test_bad_settings(mode: str, low: float, high: float) -> None:
    with pytest.raises(ConfigError):
        correction_weights([make_sample()], mode, low=low, high=high)
