"""How one Megatron parameter and its Hugging Face tensors turn into each other, both ways.

A ``WeightMap`` names one Megatron parameter (``target``), the tensors it is made of (``sources``,
with their shapes) and four pure functions: ``to_megatron`` and ``to_hf`` for whole tensors,
``shard`` and ``unshard`` for tensor parallelism. An expert's parameters are whole on the
expert-parallel ranks that hold the expert. One table serves import, export and weight transfer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Shape = tuple[int, ...]
Stage = Literal["first", "layer", "last"]


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

    def to_megatron(self, sources: Sequence[Tensor]) -> Tensor:
        """The whole Megatron tensor."""
        return sources[0]

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        """The Hugging Face tensors, in the order of ``sources``."""
        return (full,)

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """What tensor-parallel rank ``rank`` of ``size`` holds."""
        return full

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole Megatron tensor from all ranks' shards, in rank order."""
        return shards[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitMap(WeightMap):
    """A renamed parameter split evenly along ``axis``."""

    axis: int

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, self.axis)[rank]

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), self.axis)


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

    def to_megatron(self, sources: Sequence[Tensor]) -> Tensor:
        rest = sources[0].shape[1:]
        parts = [source.reshape(self.groups, -1, self.head_dim, *rest) for source in sources]
        return torch.cat(parts, 1).reshape(-1, *rest)

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        rest = full.shape[1:]
        grouped = full.reshape(self.groups, -1, self.head_dim, *rest)
        heads = grouped.shape[1] - 2
        return tuple(part.reshape(-1, *rest) for part in grouped.split((heads, 1, 1), 1))

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, 0)[rank]

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedMap(WeightMap):
    """Gate and up projections of a gated MLP in one parameter; each rank holds a slice of both.

    Rank r of 2 holds ``gate[r] | up[r]``, the whole tensor is ``gate | up``.
    """

    def to_megatron(self, sources: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(sources), 0)

    def to_hf(self, full: Tensor) -> tuple[Tensor, ...]:
        gate, up = full.chunk(2, 0)
        return gate, up

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        gate, up = full.chunk(2, 0)
        return torch.cat((gate.chunk(size, 0)[rank], up.chunk(size, 0)[rank]), 0)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        halves = [shard.chunk(2, 0) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabMap(WeightMap):
    """An embedding ``[V, hidden]`` split along the vocabulary, zero rows added to split evenly."""

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        rows = padded_vocab(full.shape[0], size) // size
        part = full[rank * rows : (rank + 1) * rows]
        if len(part) == rows:
            return part
        return torch.cat((part, full.new_zeros(rows - len(part), *full.shape[1:])), 0)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), 0)[: self.shapes[0][0]]


def padded_vocab(vocab_size: int, tensor_parallel: int) -> int:
    """The smallest multiple of ``tensor_parallel`` that holds the vocabulary."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel
