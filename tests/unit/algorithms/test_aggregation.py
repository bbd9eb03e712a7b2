"""Token weights by hand, against a slow reference, and their invariance to order and splitting."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.algorithms.aggregation import token_weights
from megatron_spear.errors import ConfigError
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import TrainSample

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def _slow_loss(trajectories: list[list[float]], mode: str, norm_length: int) -> float:
    """The textbook definitions over trajectories of token losses."""
    count = len(trajectories)
    if mode == "token-mean":
        tokens = [loss for losses in trajectories for loss in losses]
        return sum(tokens) / len(tokens)
    if mode == "seq-mean-token-sum":
        return sum(sum(losses) for losses in trajectories) / count
    if mode == "seq-mean-token-mean":
        return sum(sum(losses) / len(losses) for losses in trajectories if losses) / count
    return sum(sum(losses) for losses in trajectories) / count / norm_length


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [
        ("token-mean", 1 / 4, 1 / 4),
        ("seq-mean-token-sum", 1 / 2, 1 / 2),
        ("seq-mean-token-mean", 1 / 6, 1 / 2),
        ("seq-mean-token-sum-norm", 1 / 20, 1 / 20),
    ],
)
def test_by_hand(mode: str, first: float, second: float) -> None:
    samples = [make_sample(mask=[0, 1, 1, 0, 1]), make_sample(member=1, mask=[0, 1])]
    weights = token_weights(samples, mode, 10)
    assert weights[0].tolist() == pytest.approx([0, first, first, 0, first])
    assert weights[1].tolist() == pytest.approx([0, second])
    doubled = token_weights(samples, mode, 10, scale=2.0)
    assert doubled[1].tolist() == pytest.approx([0, 2 * second])
    assert weights[0].dtype == np.float64


def _split(member: int, mask: list[int], cuts: list[int]) -> list[TrainSample]:
    bounds = [0, *sorted(cuts), len(mask)]
    pieces = [mask[a:b] for a, b in pairwise(bounds)]
    return [
        make_sample(member=member, mask=piece, segment=i, num_segments=len(pieces))
        for i, piece in enumerate(pieces)
    ]


@settings(deadline=None)  # the machine may be busy
@given(st.data(), st.sampled_from(MODES))
def test_reference_order_and_splitting(data: st.DataObject, mode: str) -> None:
    masks = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1))
    losses = [[float(3 * i - 2 * t) for t in range(len(mask))] for i, mask in enumerate(masks)]
    if not any(map(any, masks)):
        return
    samples, flat = [], {}
    for i, mask in enumerate(masks):
        cuts = data.draw(st.lists(st.integers(1, max(1, len(mask) - 1)), max_size=2, unique=True))
        pieces = _split(i, mask, [cut for cut in cuts if cut < len(mask)])
        at = 0
        for piece in pieces:
            flat[i, piece.segment] = losses[i][at : at + len(piece.token_ids)]
            at += len(piece.token_ids)
        samples += pieces
    samples = data.draw(st.permutations(samples))
    weights = token_weights(samples, mode, 16)
    total = sum(
        float(np.dot(w, flat[s.trajectory_id.member, s.segment]))
        for s, w in zip(samples, weights, strict=True)
    )
    masked = [
        [x for x, m in zip(row, mask, strict=True) if m]
        for row, mask in zip(losses, masks, strict=True)
    ]
    assert total == pytest.approx(_slow_loss(masked, mode, 16), abs=1e-9)


def test_trajectory_without_tokens_counts_and_stays_finite() -> None:
    samples = [make_sample(mask=[0, 1]), make_sample(member=1, mask=[0, 0])]
    for mode in MODES:
        weights = token_weights(samples, mode, 4)
        assert np.isfinite(np.concatenate(weights)).all() and not weights[1].any()
    assert token_weights(samples, "seq-mean-token-sum", 4)[0][1] == 0.5
    assert token_weights(samples[1:], "token-mean", 4)[0].tolist() == [0, 0]
    assert token_weights([], "token-mean", 4) == []


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="seq-mean-token-sum-norm"):
        token_weights([make_sample()], "mean", 4)
