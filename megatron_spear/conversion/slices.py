"""What a training rank holds of Hugging Face tensors, as views of its Megatron parameters."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spear.conversion.mapping import VocabMap, WeightMap
from megatron_spear.conversion.sizes import padded_vocab


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """Entries ``start`` to ``stop`` along ``axis`` of the Hugging Face tensor ``name``.

    ``blocks`` gives the present values: the slice's rows, one block ``[rows, ...]`` after the
    other. They are views of the parameter, unless it is held in FP8.
    """

    name: str
    axis: int
    start: int
    stop: int
    dtype: torch.dtype
    blocks: Callable[[], tuple[Tensor, ...]]


def slices_of(
    item: WeightMap, part: Callable[[], Tensor], dtype: torch.dtype, rank: int, size: int
) -> Iterator[TensorSlice]:
    """The slices of one parameter, of which tensor-parallel rank ``rank`` of ``size`` holds
    ``part``.

    Vocabulary padding is cut; a rank that holds padding only has no slice. Experts are whole.

    Example: a vocabulary of 211 on two ranks of 106 rows: rank 1 has rows 106 to 211.
    """
    axis = None if item.expert is not None else item.split_axis
    for number, (name, shape) in enumerate(zip(item.sources, item.shapes, strict=True)):
        start, stop = 0, shape[0]
        if axis is not None:
            width = padded_vocab(shape[axis], size) // size
            start, stop = (min(place * width, shape[axis]) for place in (rank, rank + 1))
        if start < stop:
            yield TensorSlice(
                name=name,
                axis=axis or 0,
                start=start,
                stop=stop,
                dtype=dtype,
                blocks=_Blocks(
                    item=item,
                    part=part,
                    number=number,
                    keep=stop - start if isinstance(item, VocabMap) else None,
                ),
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blocks:
    """One source's rows when called, the first ``keep`` where there is padding."""

    item: WeightMap
    part: Callable[[], Tensor]
    number: int
    keep: int | None

    def __call__(self) -> tuple[Tensor, ...]:
        blocks = self.item.rows(self.part())[self.number]
        return blocks if self.keep is None else (blocks[0][: self.keep],)
