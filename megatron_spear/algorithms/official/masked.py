"""The official code's masked statistics and loss aggregation over one padded micro-batch.

Tensors are ``[B, T]``: B rows padded to width T, mask 1.0 on trained tokens. These serve
``algorithm.compat: official`` (numbers as the official code computes them, wrong ones included);
the default method is in ``aggregation``. Two habits of that code show in every result: means divide
by (tokens + 1e-8), and widths and row counts are those of the micro-batch, padding included.
"""

import torch
from torch import Tensor

from megatron_spear.errors import ConfigError

MEAN_EPSILON = 1e-8
VARIANCE_EPSILON = 1e-8


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the masked entries, of all or along ``dim``; what is outside may be NaN."""
    kept = torch.where(mask.bool(), values, torch.zeros_like(values)) * mask
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Masked sum over (number of masked entries + 1e-8): 0 where nothing is masked."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / (count + MEAN_EPSILON)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of the masked entries. Raises ValueError for fewer than two."""
    count = mask.sum()
    if count < 2:
        raise ValueError(f"variance: got {int(count)} masked entries, expected at least 2")
    mean = masked_mean(values, mask)
    return masked_mean((values - mean).square(), mask) * count / (count - 1)


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """All values (unmasked ones too) shifted to mean 0 and scaled to variance 1 of the masked.

    ``shift_mean`` False adds the mean back.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_variance(values, mask) + VARIANCE_EPSILON)
    return whitened if shift_mean else whitened + mean


def aggregate(losses: Tensor, mask: Tensor, mode: str, *, group_size: int | None = None) -> Tensor:
    """One scalar from token losses.

    | mode | value |
    |---|---|
    | ``token-mean`` | masked mean |
    | ``seq-mean-token-sum`` | mean over rows of their sums |
    | ``seq-mean-token-mean`` | mean over rows of their means; NaN if a row is empty |
    | ``seq-mean-token-sum-norm`` | sum of all over T |
    | ``seq-norm-token-sum`` | mean over rows of sum / tokens of the row's group |

    A group is ``group_size`` consecutive rows; without it ``seq-norm-token-sum`` is
    ``seq-mean-token-sum-norm``. Raises ConfigError for an unknown mode.

    Example: rows [1, 2] and [3, -] of width 2: 2, 3, 2.25, 3 and, in one group of 2, 1.
    """
    if mode == "token-mean":
        return masked_mean(losses, mask)
    row_sums = (losses * mask).sum(-1)
    row_tokens = mask.sum(-1)
    if mode == "seq-mean-token-sum":
        return row_sums.mean()
    if mode == "seq-mean-token-mean":
        return (row_sums / row_tokens).mean()
    if mode == "seq-norm-token-sum" and group_size is not None:
        group_tokens = row_tokens.view(-1, group_size).sum(-1).repeat_interleave(group_size)
        return (row_sums / group_tokens).mean()
    if mode in ("seq-mean-token-sum-norm", "seq-norm-token-sum"):
        return row_sums.sum() / losses.shape[-1]
    raise ConfigError(f"official aggregation: got {mode!r}, expected one of {', '.join(MODES)}")


MODES = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "seq-norm-token-sum",
)
