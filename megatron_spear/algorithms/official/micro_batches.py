"""What the official code's micro-batches do to a loss, as token weights and dropped tokens.

The official loss of a micro-batch is an aggregate over its own rows, times its share of the
mini-batch's rows; covariance means and quota are its own too (defects 11, 12). Both are functions
of which rows share a micro-batch, so they can be said as weights, and the packing that really runs
is free.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_spear.algorithms.aggregation import WeightArray
from megatron_spear.algorithms.official.filters import shuffled
from megatron_spear.algorithms.official.losses import (
    OfficialClip,
    covariance_drop,
    kl_cov_selected,
)
from megatron_spear.algorithms.official.masked import aggregate
from megatron_spear.algorithms.surrogates import clipped_surrogate
from megatron_spear.types import BoolArray, TrainSample

_Rows = Sequence[TrainSample]
_T = TypeVar("_T")


def official_token_weights(
    rows: _Rows, micro_batch_rows: int, mode: str, width: int, *, scale: float = 1.0
) -> list[WeightArray]:
    """float64 ``[L]`` of each row: what a plain sum needs to equal the official loss.

    Consecutive ``micro_batch_rows`` rows are a micro-batch, padded to ``width`` response tokens (to
    the longest row where that is longer). ``scale`` is gamma.

    Example: rows of 2 and 1 tokens in one micro-batch with ``seq-mean-token-sum-norm`` and width
    10: 1/10 on every token; in micro-batches of their own: 1/20.
    """
    result: list[WeightArray] = []
    for chunk in _chunks(rows, micro_batch_rows):
        (mask,) = _padded(chunk, [[s.response_mask for s in chunk]], width)
        unit = torch.ones_like(mask, requires_grad=True)
        loss = aggregate(unit, mask, mode) * (scale * len(chunk) / len(rows))
        (gradient,) = torch.autograd.grad(loss, unit)
        result += _unpadded(chunk, gradient)
    return result


def official_dropped(
    rows: _Rows,
    logprobs: Sequence[npt.NDArray[np.floating]],
    micro_batch_rows: int,
    clip: OfficialClip,
    *key: int | str,
) -> list[BoolArray]:
    """bool ``[L]`` of each row: the tokens its micro-batch drops (clip_cov).

    The official permutation is torch's, unseeded; here it is drawn by ``key`` and the micro-batch.
    """

    def dropped(
        number: int, mask: Tensor, current: Tensor, old: Tensor, advantages: Tensor
    ) -> Tensor:
        _, clipped, _ = clipped_surrogate(
            (current - old).exp(), advantages, clip.clip_low, clip.clip_high, None
        )

        def permutation(count: int) -> Tensor:
            order = shuffled(np.arange(count), *key, "official clip_cov", number)
            return torch.from_numpy(order)

        drop = covariance_drop(current, advantages, mask, clipped, clip, permutation)
        flags = torch.zeros_like(mask)
        flags[drop.dropped[:, 0], drop.dropped[:, 1]] = 1.0
        return flags

    return _flagged(rows, logprobs, micro_batch_rows, dropped)


def official_kl_selected(
    rows: _Rows,
    logprobs: Sequence[npt.NDArray[np.floating]],
    micro_batch_rows: int,
    fraction: float,
) -> list[BoolArray]:
    """bool ``[L]`` of each row: the tokens that pay in its micro-batch (kl_cov)."""

    def selected(_: int, mask: Tensor, current: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        return kl_cov_selected(current, advantages, mask, fraction).double()

    return _flagged(rows, logprobs, micro_batch_rows, selected)


def _flagged(
    rows: _Rows,
    logprobs: Sequence[npt.NDArray[np.floating]],
    micro_batch_rows: int,
    flag: Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor],
) -> list[BoolArray]:
    """bool ``[L]`` of each row, from each micro-batch's ``flag(number, mask, logprobs,
    old_logprobs, advantages)``, all ``[B, T]``; above 0 is True."""
    result: list[BoolArray] = []
    chunks = zip(_chunks(rows, micro_batch_rows), _chunks(logprobs, micro_batch_rows), strict=True)
    for number, (chunk, own) in enumerate(chunks):
        masks = [s.response_mask for s in chunk]
        columns = [masks, own, [s.old_logprobs for s in chunk], [s.advantages for s in chunk]]
        flags = flag(number, *_padded(chunk, columns, 1))
        result += [row > 0 for row in _unpadded(chunk, flags)]
    return result


def _chunks(rows: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _padded(
    rows: _Rows, columns: Sequence[Sequence[npt.NDArray[np.generic]]], width: int
) -> list[Tensor]:
    """float64 ``[B, T]`` of each column: the response tokens of each row, left-aligned."""
    longest = max(int(row.response_mask.sum()) for row in rows)
    result = []
    for column in columns:
        values = torch.zeros(len(rows), max(width, longest, 1), dtype=torch.float64)
        for index, (row, entry) in enumerate(zip(rows, column, strict=True)):
            own = entry[row.response_mask].astype(np.float64)
            values[index, : len(own)] = torch.from_numpy(own)
        result.append(values)
    return result


def _unpadded(rows: _Rows, values: Tensor) -> list[WeightArray]:
    """float64 ``[L]`` of each row from ``[B, T]``: back on its response tokens."""
    result = []
    for row, own in zip(rows, values.numpy(), strict=True):
        spread = np.zeros(len(row.token_ids))
        spread[row.response_mask] = own[: int(row.response_mask.sum())]
        result.append(spread)
    return result
