"""Which rank holds which slice of a Hugging Face tensor, in training and in an engine.

Both sides cut tensors along one axis, so a holding is an interval of rows or columns. Nothing here
knows weights: holdings follow from the weight table and the sizes of the layouts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from megatron_spear.conversion.mapping import (
    ENGINE_VOCAB_MULTIPLE,
    QkvMap,
    VocabMap,
    WeightMap,
    place_of,
)
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import padded_vocab
from megatron_spear.conversion.training_layout import TrainingLayout as TrainingLayout
from megatron_spear.errors import ConfigError


class Sizes(Protocol):
    """The sizes of a training layout; ``policy.parallel.ParallelContext`` has them."""

    @property
    def tensor_size(self) -> int: ...
    @property
    def context_size(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    @property
    def pipeline_size(self) -> int: ...
    @property
    def expert_size(self) -> int: ...


def layout_of(sizes: Sizes, *, virtual: int = 1) -> TrainingLayout:
    """The layout of a running policy; ``virtual`` is ``policy.virtual_pipeline``."""
    return TrainingLayout(
        tensor=sizes.tensor_size,
        context=sizes.context_size,
        data=sizes.data_size,
        pipeline=sizes.pipeline_size,
        virtual=virtual,
        expert=sizes.expert_size,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayout:
    """Ranks of the engines: ``replicas`` engines of ``tensor`` ranks each, one after the other.

    Experts are spread over ``expert`` groups of neighbours; within a group of ``tensor / expert``
    ranks each expert is split.
    """

    tensor: int = 1
    expert: int = 1
    replicas: int = 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.replicas


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """Ranks that each hold entries ``start`` to ``stop`` along ``axis`` of a tensor."""

    ranks: range
    axis: int
    start: int
    stop: int


def check_layouts(model: ModelShape, training: TrainingLayout, engine: EngineLayout) -> None:
    """ConfigError with every size that does not divide."""
    layers = {"num_layers": model.num_layers}
    experts = {"num_experts": model.num_experts}
    split = {"num_heads": model.num_heads, "num_groups": model.num_groups}
    dense = {} if model.num_experts else {"ffn_size": model.ffn_size}
    rules = [
        ("training tensor parallel", training.tensor, split | dense),
        ("training pipeline x virtual", training.pipeline * training.virtual, layers),
        ("training expert parallel", training.expert, experts),
        ("training expert parallel", training.expert, {"ranks of a stage": training.stage_size}),
        ("engine tensor parallel", engine.tensor, {"num_heads": model.num_heads} | dense),
        ("engine expert parallel", engine.expert, {"engine tensor parallel": engine.tensor}),
    ]
    if model.num_experts:
        rules.append(("engine expert parallel", engine.expert, experts))
        inner = engine.tensor // engine.expert
        rules.append(("engine ranks an expert is split over", inner, {"ffn_size": model.ffn_size}))
    wrong = [
        f"{name}={size} is not a multiple of {what}={parts}"
        for what, parts, sizes in rules
        for name, size in sizes.items()
        if size % parts
    ]
    groups, parts = model.num_groups, engine.tensor
    if groups % parts and parts % groups:
        wrong.append(f"num_groups={groups} and engine tensor parallel={parts}: neither divides")
    if wrong:
        raise ConfigError("these layouts cannot work:\n" + "\n".join(f"  {w}" for w in wrong))


def training_holdings(
    item: WeightMap, source: int, model: ModelShape, layout: TrainingLayout
) -> Iterator[Holding]:
    """Who holds which part of the item's ``source``-th tensor; each part once, with its copies."""
    number, _ = place_of(item, model.num_layers, layout.pipeline, layout.virtual)
    stage = range(number * layout.stage_size, (number + 1) * layout.stage_size)
    shape = item.shapes[source]
    if item.expert is not None:
        own = item.expert // (model.num_experts // layout.expert)
        yield Holding(ranks=stage[own :: layout.expert], axis=0, start=0, stop=shape[0])
        return
    axis = item.split_axis
    if axis is None:
        yield Holding(ranks=stage, axis=0, start=0, stop=shape[0])
        return
    size = shape[axis]
    rows = padded_vocab(size, layout.tensor) // layout.tensor
    for rank in range(layout.tensor):
        start, stop = min(rank * rows, size), min((rank + 1) * rows, size)
        if start < stop:
            ranks = stage[rank :: layout.tensor]
            yield Holding(ranks=ranks, axis=axis, start=start, stop=stop)


def engine_holdings(
    item: WeightMap, source: int, model: ModelShape, layout: EngineLayout
) -> Iterator[Holding]:
    """Which part each rank of the first replica needs (``ranks`` has one); none that needs none."""
    shape = item.shapes[source]
    for rank in range(layout.tensor):
        axis, start, stop = _needed(item, source, rank, shape, model, layout)
        if start < stop:
            yield Holding(ranks=range(rank, rank + 1), axis=axis, start=start, stop=stop)


def engine_vocab_rows(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of an engine rank's embedding, padding included.

    Example: 133 rows on 2 ranks are padded to 192, 96 each.
    """
    padded = padded_vocab(vocab_size, ENGINE_VOCAB_MULTIPLE)
    if padded % tensor_parallel:
        padded = padded_vocab(vocab_size, ENGINE_VOCAB_MULTIPLE * tensor_parallel)
    return padded // tensor_parallel


def _needed(
    item: WeightMap,
    source: int,
    rank: int,
    shape: tuple[int, ...],
    model: ModelShape,
    layout: EngineLayout,
) -> tuple[int, int, int]:
    """(axis, start, stop) of an engine rank."""
    if item.expert is not None:
        inner = layout.tensor // layout.expert
        group, part = divmod(rank, inner)
        if item.expert // (model.num_experts // layout.expert) != group:
            return 0, 0, 0
        axis = 0 if item.target.startswith("linear_fc1") else 1
        size = shape[axis] // inner
        return axis, part * size, (part + 1) * size
    if item.split_axis is None:
        return 0, 0, shape[0]
    size = shape[item.split_axis]
    if isinstance(item, VocabMap):
        rows = engine_vocab_rows(size, layout.tensor)
        return 0, min(rank * rows, size), min((rank + 1) * rows, size)
    parts = layout.tensor
    if isinstance(item, QkvMap) and source > 0:
        parts = min(parts, model.num_groups)  # fewer keys and values than ranks: each has a copy
    width = size // parts
    place = rank * parts // layout.tensor
    return item.split_axis, place * width, (place + 1) * width
