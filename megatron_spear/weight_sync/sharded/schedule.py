"""The plan's transfers as messages, in an order in which no rank waits for ever.

Pure and deterministic: every rank computes the same. Large slices are messages of their own, so
that they may go from memory to memory without a copy; small ones travel together. Each rank works
through its messages in the one total order, so of all that are left the first always has both its
ends at it.

    source 0 -> target 0   [a][b ][c]          round 1: 0->0 a, 1->1 d
    source 1 -> target 1   [d][e]              round 2: 0->0 b, 1->1 e       in a round, a rank has
    source 1 -> target 0   [f]                 round 3: 0->0 c ...           one message
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_spear.conversion import fp8_blocks
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.errors import ConfigError
from megatron_spear.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_spear.weight_sync.plan import Plan, Transfer, plan_resharding
from megatron_spear.weight_sync.sharded.records import (
    Bucket,
    HeldTensor,
    Part,
    Piece,
    aligned,
    shape_as_rows,
)

ALONE_BYTES = 1 << 20
"""A piece of as many bytes is a message of its own: then the message's cost is small beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSchedule:
    """What one replica receives: ``buckets`` in the total order, and by rank of the replica what it
    then holds. ``needed_bytes`` is the least that has to travel, without padding."""

    buckets: tuple[Bucket, ...]
    tensors: tuple[tuple[HeldTensor, ...], ...]
    needed_bytes: int

    @property
    def senders(self) -> tuple[int, ...]:
        """Training ranks that send, and the controller, which leads."""
        return tuple(sorted({0, *(bucket.source for bucket in self.buckets)}))

    def part(self, rank: int) -> Part:
        """What concerns a rank of the replica."""
        return self.tensors[rank], tuple(b for b in self.buckets if b.target == rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """A Hugging Face tensor's shape and whether it is sent in FP8."""

    shape: tuple[int, ...]
    quantized: bool


def schedules(
    model: ModelShape,
    training: TrainingLayout,
    engine: EngineLayout,
    *,
    dtype: torch.dtype,
    fp8: bool,
    bucket_bytes: int,
) -> tuple[ReplicaSchedule, ...]:
    """One schedule for each replica; ``dtype`` is that of the weights in training.

    With ``fp8`` linear layers are sent in blocks of 128 x 128 with their scales. Raises ConfigError
    for layouts that the plan refuses, for slices that cut FP8 blocks, and for buckets too small for
    a row.
    """
    plan = plan_resharding(model, training, engine, bytes_per_value=dtype.itemsize)
    kinds = {
        name: _Kind(shape=shape, quantized=fp8 and fp8_blocks.is_quantized(item))
        for item in weight_table(model)
        if not item.tied
        for name, shape in zip(item.sources, item.shapes, strict=True)
    }
    if fp8:
        _refuse_cut_blocks(plan, kinds)
    return tuple(
        _of_replica(plan, kinds, replica, engine.tensor, dtype, bucket_bytes)
        for replica in range(engine.replicas)
    )


def _of_replica(
    plan: Plan,
    kinds: Mapping[str, _Kind],
    replica: int,
    num_ranks: int,
    dtype: torch.dtype,
    bucket_bytes: int,
) -> ReplicaSchedule:
    queues: dict[tuple[int, int], list[Bucket]] = {}
    tensors: list[tuple[HeldTensor, ...]] = []
    needed = 0
    for rank in range(num_ranks):
        transfers = plan.transfers(target=replica * num_ranks + rank)
        held = _held(transfers, kinds, dtype)
        numbers = {tensor.name: number for number, tensor in enumerate(held)}
        needed += sum(tensor.torch_dtype.itemsize * _values(tensor.held_shape) for tensor in held)
        by_source: dict[int, list[Transfer]] = defaultdict(list)
        for transfer in transfers:
            by_source[transfer.source].append(transfer)
        for source, own in by_source.items():
            loads = (
                load for t in own for load in _loads(t, kinds[t.name], held, numbers, bucket_bytes)
            )
            queues[source, rank] = list(_buckets(loads, source, rank, bucket_bytes))
        tensors.append(held)
    return ReplicaSchedule(
        buckets=tuple(in_rounds(queues)), tensors=tuple(tensors), needed_bytes=needed
    )


def _values(shape: Sequence[int]) -> int:
    rows, columns = shape_as_rows(shape)
    return rows * columns


def _held(
    transfers: Sequence[Transfer], kinds: Mapping[str, _Kind], dtype: torch.dtype
) -> tuple[HeldTensor, ...]:
    """What an engine rank holds after its transfers; FP8 tensors are followed by their scales."""
    bounds: dict[str, tuple[int, int, int]] = {}
    for t in transfers:
        _, start, stop = bounds.get(t.name, (t.axis, t.start, t.stop))
        bounds[t.name] = (t.axis, min(start, t.start), max(stop, t.stop))
    held: list[HeldTensor] = []
    for name, (axis, start, stop) in bounds.items():
        kind = kinds[name]
        values = torch.float8_e4m3fn if kind.quantized else dtype
        held.append(_tensor(name, values, kind.shape, axis, start, stop))
        if kind.quantized:
            blocks = (start // fp8_blocks.BLOCK, -(-stop // fp8_blocks.BLOCK))
            shape = fp8_blocks.scale_shape(kind.shape)
            held.append(_tensor(name + fp8_blocks.SCALE, torch.float32, shape, axis, *blocks))
    return tuple(held)


def _tensor(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], axis: int, start: int, stop: int
) -> HeldTensor:
    word = str(dtype).removeprefix("torch.")
    return HeldTensor(name=name, dtype=word, shape=shape, axis=axis, start=start, stop=stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Load:
    """Pieces that stay together: one, or FP8 values and their scales."""

    pieces: tuple[Piece, ...]
    num_bytes: int


def _loads(
    transfer: Transfer,
    kind: _Kind,
    held: Sequence[HeldTensor],
    numbers: Mapping[str, int],
    bucket_bytes: int,
) -> Iterator[_Load]:
    """A transfer cut by rows into what fits a bucket."""
    rows, columns = shape_as_rows(kind.shape)
    row, row_stop, column, column_stop = 0, rows, 0, columns
    if transfer.axis == 0:
        row, row_stop = transfer.start, transfer.stop
    else:
        column, column_stop = transfer.start, transfer.stop
    step = fp8_blocks.BLOCK if kind.quantized else 1
    each = _load(transfer.name, kind, held, numbers, (0, min(step, rows), column, column_stop))
    if each.num_bytes > bucket_bytes:
        raise ConfigError(
            f"weight_sync.bucket_bytes is {bucket_bytes}, but {step} rows of {transfer.name} are "
            f"{each.num_bytes} bytes; set it to at least that"
        )
    most = bucket_bytes // each.num_bytes * step
    for start in range(row, row_stop, most):
        stop = min(start + most, row_stop)
        yield _load(transfer.name, kind, held, numbers, (start, stop, column, column_stop))


def _load(
    name: str,
    kind: _Kind,
    held: Sequence[HeldTensor],
    numbers: Mapping[str, int],
    block: tuple[int, int, int, int],
) -> _Load:
    pieces = [_piece(numbers[name], block)]
    if kind.quantized:
        row, row_stop, column, column_stop = block
        size = fp8_blocks.BLOCK
        scales = (row // size, -(-row_stop // size), column // size, -(-column_stop // size))
        pieces.append(_piece(numbers[name + fp8_blocks.SCALE], scales))
    num_bytes = sum(
        aligned(piece.num_values * held[piece.tensor].torch_dtype.itemsize) for piece in pieces
    )
    return _Load(pieces=tuple(pieces), num_bytes=num_bytes)


def _piece(tensor: int, block: tuple[int, int, int, int]) -> Piece:
    row, row_stop, column, column_stop = block
    return Piece(tensor=tensor, row=row, row_stop=row_stop, column=column, column_stop=column_stop)


def _buckets(
    loads: Iterator[_Load], source: int, target: int, bucket_bytes: int
) -> Iterator[Bucket]:
    """Large loads alone, small ones together, in order."""
    pieces: list[Piece] = []
    size = 0
    for load in loads:
        if load.num_bytes >= ALONE_BYTES:
            yield Bucket(source=source, target=target, pieces=load.pieces, num_bytes=load.num_bytes)
            continue
        if size + load.num_bytes > bucket_bytes:
            yield Bucket(source=source, target=target, pieces=tuple(pieces), num_bytes=size)
            pieces, size = [], 0
        pieces += load.pieces
        size += load.num_bytes
    if pieces:
        yield Bucket(source=source, target=target, pieces=tuple(pieces), num_bytes=size)


def in_rounds(queues: Mapping[tuple[int, int], Sequence[Bucket]]) -> Iterator[Bucket]:
    """The total order: rounds in which a rank has at most one message, fullest queues first.

    Messages of a pair keep their order.
    """
    left = {pair: list(reversed(queue)) for pair, queue in sorted(queues.items()) if queue}
    while left:
        sources: set[int] = set()
        targets: set[int] = set()
        for pair in sorted(left, key=lambda pair: -len(left[pair])):
            source, target = pair
            if source in sources or target in targets:
                continue
            sources.add(source)
            targets.add(target)
            yield left[pair].pop()
        left = {pair: queue for pair, queue in left.items() if queue}


def _refuse_cut_blocks(plan: Plan, kinds: Mapping[str, _Kind]) -> None:
    """ConfigError for every tensor of which a slice begins or ends within an FP8 block."""
    wrong: dict[str, str] = {}
    for t in plan.transfers():
        kind = kinds[t.name]
        if not kind.quantized or t.name in wrong:
            continue
        ends = (t.start, 0 if t.stop == kind.shape[t.axis] else t.stop)
        if any(end % fp8_blocks.BLOCK for end in ends):
            what = ("rows", "columns")[t.axis]
            wrong[t.name] = (
                f"  {t.name} {kind.shape}: training rank {t.source} sends {what} {t.start} to "
                f"{t.stop} to engine rank {t.target}"
            )
    if wrong:
        shown = [*wrong.values()][:8]
        rest = [f"  and {len(wrong) - len(shown)} more"] if len(wrong) > len(shown) else []
        raise ConfigError(
            "weight_sync.precision=fp8 needs slices that begin and end at multiples of "
            f"{fp8_blocks.BLOCK}, where the scales' blocks do:\n"
            + "\n".join([*shown, *rest])
            + "\n"
            "use less tensor parallelism in training or in the engines, "
            "weight_sync.precision=model, or another transport (broadcast, disk)"
        )
