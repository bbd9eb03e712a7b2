"""The masked tokens of an update, block by block: each small enough for a processor's cache.

Statistics over a million tokens are bound by memory; what is temporary should never leave the
cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.draws import DrawArray, stream_draws, stream_key
from megatron_spear.types import BoolArray, TrainSample

BLOCK_TOKENS = 2**16

_AnyFloats = npt.NDArray[np.floating]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class MaskedBlock:
    """Consecutive samples of an update, laid end to end: T tokens, of them M masked.

    ``start`` is the place of the first token in the whole update, ``mask`` bool ``[T]``;
    ``logprobs`` and ``advantages`` ``[M]`` are those of the masked tokens.
    """

    samples: Sequence[TrainSample]
    start: int
    mask: BoolArray
    logprobs: _AnyFloats
    advantages: _AnyFloats

    def positions(self, chosen: Indices | BoolArray) -> Indices:
        """Of the ``chosen`` masked tokens: their places in the whole update."""
        return self.start + np.flatnonzero(self.mask)[chosen]


def masked_blocks(
    samples: Sequence[TrainSample], logprobs: Sequence[_AnyFloats]
) -> list[MaskedBlock]:
    """All samples in order, as blocks; ``logprobs`` ``[L]`` belong to each sample."""
    blocks: list[MaskedBlock] = []
    first, start, length = 0, 0, 0
    for last, sample in enumerate(samples, 1):
        length += len(sample.token_ids)
        if length >= BLOCK_TOKENS or last == len(samples):
            blocks.append(_block(samples[first:last], logprobs[first:last], start))
            first, start, length = last, start + length, 0
    return blocks


def _block(
    samples: Sequence[TrainSample], logprobs: Sequence[_AnyFloats], start: int
) -> MaskedBlock:
    mask = np.concatenate([sample.response_mask for sample in samples])
    flat_logprobs = np.concatenate(logprobs)
    assert len(flat_logprobs) == len(mask), "one log-prob per token of every sample"
    positions = np.flatnonzero(mask)
    return MaskedBlock(
        samples=samples,
        start=start,
        mask=mask,
        logprobs=flat_logprobs.take(positions),
        advantages=np.concatenate([s.advantages for s in samples]).take(positions),
    )


def token_draws(samples: Sequence[TrainSample], positions: Indices, *key: int | str) -> DrawArray:
    """uint64 ``[P]`` for the tokens at these ascending ``positions`` of the samples laid end to
    end, keyed by (``key``, trajectory, segment, token)."""
    ids = [s.trajectory_id for s in samples]
    of_group = {group: stream_key(*key, group) for group in {i.group for i in ids}}
    keys = np.array([of_group[i.group] for i in ids], np.uint64)
    keys = stream_draws(keys, np.array([i.member for i in ids]))
    keys = stream_draws(keys, np.array([s.segment for s in samples]))
    starts = np.cumsum([0, *(len(s.token_ids) for s in samples)])
    counts = np.diff(np.searchsorted(positions, starts))
    tokens = positions - np.repeat(starts[:-1], counts)
    return stream_draws(np.repeat(keys, counts), tokens)
