"""Resharding as a plan: which training rank sends which slice of which tensor to which engine rank.

A pure function of the weight table and the two layouts; no weights, no process groups. No tensor is
gathered: each engine rank receives just the slices it needs, each from one rank that holds it.
Where several hold the same, the one that has sent least so far sends, so that the work is even.

    training ranks with parts of a tensor      [ 0   |   1 ]          tensor parallel 2
    engine ranks that need parts of it         [0 | 1 | 2 | 3]        tensor parallel 4
    transfers                                  0->0 0->1 1->2 1->3
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.weight_sync.layouts import (
    EngineLayout,
    TrainingLayout,
    check_layouts,
    engine_holdings,
    training_holdings,
)

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """Training rank ``source`` sends entries ``start`` to ``stop`` along ``axis`` of the Hugging
    Face tensor ``name`` to engine rank ``target``; these are ``num_bytes``."""

    source: int
    target: int
    name: str
    axis: int
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All transfers, in the order of the weight table, as columns ``[N]``.

    ``tensor`` indexes ``names``; ``needed`` int64 ``[engine ranks]`` are the bytes each must have,
    the lower bound of what it receives.
    """

    names: tuple[str, ...]
    source: Ints
    target: Ints
    tensor: Ints
    axis: Ints
    start: Ints
    stop: Ints
    num_bytes: Ints
    needed: Ints
    num_sources: int

    def __len__(self) -> int:
        return len(self.source)

    def transfers(self, *, source: int | None = None, target: int | None = None) -> list[Transfer]:
        """Those of one sender, of one receiver, or all."""
        chosen = np.ones(len(self), bool)
        if source is not None:
            chosen &= self.source == source
        if target is not None:
            chosen &= self.target == target
        return [
            Transfer(
                source=int(self.source[i]),
                target=int(self.target[i]),
                name=self.names[self.tensor[i]],
                axis=int(self.axis[i]),
                start=int(self.start[i]),
                stop=int(self.stop[i]),
                num_bytes=int(self.num_bytes[i]),
            )
            for i in np.flatnonzero(chosen)
        ]

    @property
    def sent(self) -> Ints:
        """Bytes out, by training rank."""
        return np.bincount(self.source, self.num_bytes, self.num_sources).astype(np.int64)

    @property
    def received(self) -> Ints:
        """Bytes in, by engine rank."""
        return np.bincount(self.target, self.num_bytes, len(self.needed)).astype(np.int64)

    @property
    def excess(self) -> float:
        """Bytes that travel over the least possible; 1 is the best."""
        return float(self.num_bytes.sum() / self.needed.sum())


def plan_resharding(
    model: ModelShape,
    training: TrainingLayout,
    engine: EngineLayout,
    *,
    bytes_per_value: int = 2,
    table: Sequence[WeightMap] | None = None,
) -> Plan:
    """The plan for a model's weights; deterministic.

    ``table`` is for models that the policy does not run (``families.deepseek_v3``). Raises
    ConfigError for sizes that the layouts do not divide.

    Example: tensor parallel 2 to one engine of tensor parallel 4: ranks 0 and 1 send to two each.
    """
    if table is None:
        check_layouts(model, training, engine)
        table = weight_table(model)
    names: list[str] = []
    load = np.zeros(training.world_size, np.int64)
    needed = np.zeros(engine.world_size, np.int64)
    columns: list[Ints] = []
    for item in table:
        if item.tied:
            continue
        for number, name in enumerate(item.sources):
            names.append(name)
            of_tensor = list(
                _of_tensor(item, number, model, training, engine, bytes_per_value, load, needed)
            )
            for rows in of_tensor:
                columns.append(np.insert(rows, 2, len(names) - 1, axis=0))
    source, target, tensor, axis, start, stop, num_bytes = np.concatenate(columns, axis=1)
    return Plan(
        names=tuple(names),
        source=source,
        target=target,
        tensor=tensor,
        axis=axis,
        start=start,
        stop=stop,
        num_bytes=num_bytes,
        needed=needed,
        num_sources=training.world_size,
    )


def _of_tensor(
    item: WeightMap,
    number: int,
    model: ModelShape,
    training: TrainingLayout,
    engine: EngineLayout,
    bytes_per_value: int,
    load: Ints,
    needed: Ints,
) -> Iterator[Ints]:
    """Rows (source, target, axis, start, stop, bytes), each ``[replicas]``, of one tensor; counts
    them in ``load`` and ``needed``."""
    shape = item.shapes[number]
    senders = list(training_holdings(item, number, model, training))
    replicas = np.arange(engine.replicas)
    for wanted in engine_holdings(item, number, model, engine):
        (rank,) = wanted.ranks
        targets = replicas * engine.tensor + rank
        entry = prod(shape) // shape[wanted.axis] * bytes_per_value
        needed[targets] += (wanted.stop - wanted.start) * entry
        for held in senders:
            start, stop = wanted.start, wanted.stop
            if held.axis == wanted.axis:
                start, stop = max(start, held.start), min(stop, held.stop)
            if start >= stop:
                continue
            copies = np.asarray(held.ranks)
            order = copies[np.argsort(load[copies], kind="stable")]
            sources = order[replicas % len(order)]
            size = (stop - start) * entry
            np.add.at(load, sources, size)
            same = np.ones_like(replicas)
            yield np.stack(
                (sources, targets, wanted.axis * same, start * same, stop * same, size * same)
            )
