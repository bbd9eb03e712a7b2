"""Token weights by hand, against a slow reference, and their invariance to order and splitting."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.algorithms.aggregation import token_weights
from megatron_spear.algorithms.official.masked import aggregate
from megatron_spear.errors import ConfigError
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import TrainSample

MODES = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "group-mean-token-mean",
)
GROUP_SIZE = 2


def _slow_loss(trajectories: list[list[float]], mode: str, norm_length: int) -> float:
    """The textbook definitions over trajectories of token losses, two a group."""
    count = len(trajectories)
    if mode == "group-mean-token-mean":
        starts = range(0, count, GROUP_SIZE)
        groups = [[x for own in trajectories[at : at + GROUP_SIZE] for x in own] for at in starts]
        return sum(sum(losses) / len(losses) for losses in groups if losses) / len(groups)
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
        ("group-mean-token-mean", 1 / 4, 1 / 4),
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


def test_groups_are_averaged_by_their_own_tokens() -> None:
    masks = {("a", 0): [0, 1, 1], ("b", 0): [0, 1], ("a", 1): [0, 1], ("c", 0): [0, 0]}
    samples = [make_sample(group, member, mask=mask) for (group, member), mask in masks.items()]
    weights = token_weights(samples, "group-mean-token-mean", 4)
    # Three tokens of a and one of b; c has none and counts as a group all the same.
    assert [row.tolist() for row in weights] == [
        pytest.approx([0, 1 / 9, 1 / 9]),
        pytest.approx([0, 1 / 3]),
        pytest.approx([0, 1 / 9]),
        [0, 0],
    ]


def test_the_official_group_mode_is_ours_over_the_group_size() -> None:
    """Where groups are whole blocks of rows; moved rows change it, and not ours."""
    draw = np.random.default_rng(4)
    losses = draw.normal(size=(6, 5))
    mask = np.arange(5) < draw.integers(1, 6, 6)[:, None]

    def official(order: list[int]) -> float:
        rows = (torch.from_numpy(array[order]) for array in (losses, mask.astype(float)))
        return float(aggregate(*rows, "seq-norm-token-sum", group_size=3))

    def ours(order: list[int]) -> float:
        samples = [make_sample("ab"[row // 3], row % 3, mask=[0, *mask[row]]) for row in order]
        weights = token_weights(samples, "group-mean-token-mean", 4)
        return sum(float(w[1:] @ losses[row]) for w, row in zip(weights, order, strict=True))

    straight, mixed = list(range(6)), [0, 3, 1, 4, 2, 5]
    assert official(straight) == pytest.approx(ours(straight) / 3, rel=1e-12)
    assert ours(mixed) == pytest.approx(ours(straight), rel=1e-12)
    assert abs(official(mixed) - official(straight)) > 1e-3


def _split(trajectory: int, mask: list[int], cuts: list[int]) -> list[TrainSample]:
    bounds = [0, *sorted(cuts), len(mask)]
    pieces = [mask[a:b] for a, b in pairwise(bounds)]
    return [
        make_sample(
            f"{trajectory // GROUP_SIZE}",
            trajectory % GROUP_SIZE,
            mask=piece,
            segment=i,
            num_segments=len(pieces),
        )
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
            flat[piece.trajectory_id, piece.segment] = losses[i][at : at + len(piece.token_ids)]
            at += len(piece.token_ids)
        samples += pieces
    samples = data.draw(st.permutations(samples))
    weights = token_weights(samples, mode, 16)
    total = sum(
        float(np.dot(w, flat[s.trajectory_id, s.segment]))
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
