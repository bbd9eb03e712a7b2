"""How one Megatron parameter and its Hugging Face tensors turn into each other, both ways.

A ``WeightMap`` names one Megatron parameter (``target``), the tensors it is made of (``sources``,
with their shapes) and pure functions: ``to_megatron`` and ``to_hf`` for whole tensors, ``part`` and
``unshard`` for tensor parallelism, ``pieces`` for checkpoints. An expert's parameters are whole on
the expert-parallel ranks that hold the expert. One table serves import, export, checkpoints of
Megatron and weight transfer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_spear.conversion.sizes import padded_vocab

Shape = tuple[int, ...]
Stage = Literal["first", "layer", "last"]
Piece = tuple[Shape, Tensor]

ENGINE_VOCAB_MULTIPLE = 64
"""SGLang and vLLM pad the vocabulary to a multiple of this before they split it; where the ranks do
not divide the result, SGLang pads to a multiple of this times the ranks and vLLM refuses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMap:
    """A renamed parameter, the same on every rank of the tensor-parallel group.

    ``target`` is the Megatron name; for ``stage="layer"`` it is the name within the layer, and
    ``layer`` is the global layer number. A parameter of an expert has its name within the expert
    and the expert's global number. ``tied`` marks a copy of a tensor that another map owns.
    """

    target: str
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]
    stage: Stage = "layer"
    layer: int = 0
    expert: int | None = None
    tied: bool = False

    def local_name(self, first_layer: int, first_expert: int = 0) -> str:
        """The parameter's name on a rank whose layers and experts start at these.

        Example: ``linear_fc2.weight`` of expert 5 in layer 3 is
        ``decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight`` where they start at
        layer 2 and expert 4.
        """
        if self.stage != "layer":
            return self.target
        layer = f"decoder.layers.{self.layer - first_layer}."
        if self.expert is None:
            return layer + self.target
        return f"{layer}mlp.experts.local_experts.{self.expert - first_expert}.{self.target}"

    @property
    def full_shape(self) -> Shape:
        """Shape of the whole Megatron tensor, without vocabulary padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    @property
    def split_axis(self) -> int | None:
        """The axis that tensor parallelism splits, of each source and of the whole tensor alike;
        None if every rank holds all."""
        return None

    def to_megatron(self, sources: Sequence[Tensor]) -> Tensor:
        """The whole Megatron tensor; of a rank's slices of the sources, the rank's part of it."""
        return sources[0]

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        """The Hugging Face tensors, in the order of ``sources``; of a rank's part, its slices."""
        return (full,)

    def rows(self, part: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """``to_hf`` of a rank's part as views: of each source, its rows one block after the other.

        Example: queries of two groups lie apart in the part, so they are two blocks.
        """
        return tuple((tensor,) for tensor in self.to_hf(part))

    def slices(self, sources: Sequence[Tensor], rank: int, size: int) -> Sequence[Tensor]:
        """What of each source tensor-parallel rank ``rank`` of ``size`` needs; views."""
        axis = self.split_axis
        return sources if axis is None else [part.chunk(size, axis)[rank] for part in sources]

    def part(self, sources: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """What tensor-parallel rank ``rank`` of ``size`` holds."""
        return self.to_megatron(self.slices(sources, rank, size))

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole Megatron tensor from all ranks' parts, in rank order."""
        return shards[0] if self.split_axis is None else torch.cat(list(shards), self.split_axis)

    def pieces(self, sources: Sequence[Tensor], rank: int, size: int) -> list[Piece]:
        """The rank's part as blocks of the whole tensor: (where each begins, its values).

        Example: rows 6 to 11 of an embedding of 12 are ``[((6, 0), rows)]`` on rank 1 of 2. What
        every rank holds is a piece of rank 0 only.
        """
        axis, part = self.split_axis, self.part(sources, rank, size)
        if axis is None:
            return [] if rank else [((0,) * part.dim(), part)]
        return [(_offset(part, axis, rank * part.shape[axis]), part)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitMap(WeightMap):
    """A renamed parameter split evenly along ``axis``."""

    axis: int

    @property
    def split_axis(self) -> int:
        return self.axis


@dataclass(frozen=True, kw_only=True, slots=True)
class QkvMap(WeightMap):
    """Query, key and value projections fused by group, split by groups along axis 0.

    Rows of the Megatron tensor: for each of the ``groups`` key-value groups its ``heads / groups``
    query heads, its key head, its value head, ``head_dim`` rows each. Works for weights ``[rows,
    hidden]`` and biases ``[rows]``.

    Example: 4 heads, 2 groups: ``q0 q1 k0 v0 | q2 q3 k1 v1``.
    """

    groups: int
    head_dim: int

    @property
    def split_axis(self) -> int:
        return 0

    def to_megatron(self, sources: Sequence[Tensor]) -> Tensor:
        rest, groups = sources[0].shape[1:], sources[1].shape[0] // self.head_dim
        parts = [source.reshape(groups, -1, self.head_dim, *rest) for source in sources]
        return torch.cat(parts, 1).reshape(-1, *rest)

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        rest, rows = full.shape[1:], self.full_shape[0] // self.groups
        grouped = full.reshape(full.shape[0] // rows, -1, self.head_dim, *rest)
        heads = grouped.shape[1] - 2
        return tuple(part.reshape(-1, *rest) for part in grouped.split((heads, 1, 1), 1))

    def rows(self, part: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        heads = self.full_shape[0] // self.groups - 2 * self.head_dim
        groups = part.split(self.full_shape[0] // self.groups)
        blocks = zip(
            *(group.split((heads, self.head_dim, self.head_dim)) for group in groups), strict=True
        )
        return tuple(blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedMap(WeightMap):
    """Gate and up projections of a gated MLP in one parameter; each rank holds a slice of both.

    Rank r of 2 holds ``gate[r] | up[r]``, the whole tensor is ``gate | up``.
    """

    @property
    def split_axis(self) -> int:
        return 0

    def to_megatron(self, sources: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(sources), 0)

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        gate, up = full.chunk(2, 0)
        return gate, up

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        halves = [shard.chunk(2, 0) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], 0)

    def pieces(self, sources: Sequence[Tensor], rank: int, size: int) -> list[Piece]:
        parts = self.slices(sources, rank, size)
        rows = len(parts[0])
        starts = (rank * rows, (size + rank) * rows)
        return [(_offset(p, 0, start), p) for start, p in zip(starts, parts, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabMap(WeightMap):
    """An embedding ``[V, hidden]`` split along the vocabulary, zero rows added to split evenly."""

    @property
    def split_axis(self) -> int:
        return 0

    def slices(self, sources: Sequence[Tensor], rank: int, size: int) -> Sequence[Tensor]:
        (full,) = sources
        rows = padded_vocab(full.shape[0], size) // size
        part = full[rank * rows : (rank + 1) * rows]
        if len(part) < rows:
            part = torch.cat((part, full.new_zeros(rows - len(part), *full.shape[1:])), 0)
        return (part,)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), 0)[: self.shapes[0][0]]


def _offset(part: Tensor, axis: int, start: int) -> Shape:
    """Where a block begins that is whole on all axes but one."""
    return tuple(start if number == axis else 0 for number in range(part.dim()))


def place_of(
    item: WeightMap, num_layers: int, num_stages: int, num_chunks: int = 1
) -> tuple[int, int]:
    """The pipeline rank that holds the parameter, and which of its ``num_chunks`` pieces.

    Example: 8 layers on 2 ranks of 2 pieces: layer 5 is in piece 2 of all, so (0, 1).
    """
    if item.stage != "layer":
        return (0, 0) if item.stage == "first" else (num_stages - 1, num_chunks - 1)
    chunk, stage = divmod(item.layer * num_stages * num_chunks // num_layers, num_stages)
    return stage, chunk
