"""Whole checkpoints from Hugging Face to Megatron and back, one tensor at a time.

Both directions run over the family's weight table; memory is bounded by the largest tensor, not by
the model (mapped files aside). A stopped conversion goes on where it was (``shards``).
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_spear.conversion import bridge, fp8_blocks, hf_io
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import Shape, WeightMap, place_of
from megatron_spear.conversion.safetensors_out import write_safetensors
from megatron_spear.conversion.shape import ModelShape, load_config, model_shape, split_sizes
from megatron_spear.conversion.shards import Shard, write_shards
from megatron_spear.conversion.torch_dist import (
    Block,
    BlockWriter,
    TorchDistReader,
    extra_state_key,
    place_in_checkpoint,
    write_description,
)
from megatron_spear.errors import CheckpointError, ConfigError

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
FP8 = "fp8-block"
MAX_DISTCP_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The layout whose blocks a Megatron checkpoint is cut into; others read it too."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


def hf_to_megatron(
    source: Path,
    target: Path,
    layout: Layout,
    *,
    dtype: str | None = None,
    processes: int = 1,
    max_file_bytes: int = MAX_DISTCP_BYTES,
) -> None:
    """Make a ``torch_dist`` checkpoint of a Hugging Face folder.

    The model's config and tokenizer are copied beside it. ``dtype`` (fp32, bf16, fp16) converts;
    without it tensors keep theirs, which must be the config's. Raises CheckpointError for a broken
    folder, tensors too many or too few, values that are not finite, and a full disk.
    """
    if not bridge.has_table(source):
        unread = {f"--{axis}-parallel": n > 1 for axis, n in asdict(layout).items()}
        bridge.hf_to_megatron(source, target, unread | {"--dtype": dtype})
        return
    model, table = _model(source)
    _check_layout(model, layout)
    with hf_io.HfReader(source) as reader:
        hf_io.check_complete(reader, table)
        stated = _stated_dtype(source) if dtype is None else None
        sizes = {name: reader.num_bytes(name) for name in reader.names}
    entries = _entries(table, model, layout)
    shards = []
    for rank, parts in entries.items():
        weights = [_bytes(table[i], sizes) // layout.tensor for i, _ in parts]
        for number, group in enumerate(_groups(parts, weights, max_file_bytes)):
            shards.append(Shard(file=f"__{rank}_{number}.distcp", content=group))
    write = functools.partial(_write_distcp, source, layout, dtype, stated)

    def finish(work: Path, notes: Mapping[str, Any]) -> None:
        blocks = [_block(shard.file, row) for shard in shards for row in notes[shard.file]]
        _check_filled(blocks)
        write_description(work, blocks)
        kinds = [block.dtype for block in blocks if block.dtype is not None]
        hf_io.write_description(work, source, kinds[0])

    about = {
        "hf-to-megatron": str(source.resolve()),
        "files": _stamps(source),
        "dtype": dtype,
        "max_file_bytes": max_file_bytes,
        **asdict(layout),
    }
    write_shards(target, shards, write, finish, about=about, processes=processes)


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    config: Path | None = None,
    dtype: str | None = None,
    processes: int = 1,
    max_file_bytes: int = hf_io.MAX_SHARD_BYTES,
) -> None:
    """Make a Hugging Face folder of a ``torch_dist`` checkpoint of any layout.

    ``config`` is a folder with the model's config.json and tokenizer, where ``source`` has none.
    ``dtype`` is fp32, bf16, fp16 or fp8-block; without it tensors keep theirs.
    """
    described = _config_folder(source, config)
    if not bridge.has_table(described):
        bridge.megatron_to_hf(source, target, described, {"--dtype": dtype})
        return
    model, table = _model(described)
    reader = TorchDistReader(source)
    items = [(number, item) for number, item in enumerate(table) if not item.tied]
    kinds = {n: reader.dtype(place_in_checkpoint(item, model)) for n, item in items}
    weights = [prod(item.full_shape) * kinds[n].itemsize for n, item in items]
    groups = _groups([number for number, _ in items], weights, max_file_bytes)
    shards = [
        Shard(file=hf_io.shard_name(number, len(groups)), content=group)
        for number, group in enumerate(groups, 1)
    ]
    write = functools.partial(_write_hf, source, described, dtype)

    def finish(work: Path, notes: Mapping[str, Any]) -> None:
        if len(shards) > 1:
            weight_map = {name: shard.file for shard in shards for name in notes[shard.file]}
            total = sum((work / shard.file).stat().st_size for shard in shards)
            hf_io.write_index(work, weight_map, total)
        main = torch.bfloat16 if dtype == FP8 else DTYPES.get(dtype or "", kinds[items[0][0]])
        hf_io.write_description(work, described, main, fp8_blocks.CONFIG if dtype == FP8 else None)

    about = {
        "megatron-to-hf": str(source.resolve()),
        "files": _stamps(source),
        "config": str(described.resolve()),
        "dtype": dtype,
        "max_file_bytes": max_file_bytes,
    }
    write_shards(target, shards, write, finish, about=about, processes=processes)


def _write_distcp(
    source: Path,
    layout: Layout,
    dtype: str | None,
    stated: torch.dtype | None,
    file: BinaryIO,
    shard: Shard,
) -> list[Any]:
    """One ``.distcp`` file of (number in the table, tensor-parallel rank); its blocks as rows."""
    model, table = _model(source)
    writer = BlockWriter(file, shard.file)
    with hf_io.HfReader(source) as reader:
        for number, rank in shard.content:
            item = table[number]
            place = place_in_checkpoint(item, model, layout.tensor)
            sources = [
                reader.get(name, shape)
                for name, shape in zip(item.sources, item.shapes, strict=True)
            ]
            if rank == 0:
                for name, tensor in zip(item.sources, sources, strict=True):
                    _check_values(name, tensor, stated, source)
            if dtype is not None:
                sources = [tensor.to(DTYPES[dtype]) for tensor in sources]
            split = layout.tensor if item.expert is None else 1
            for offset, piece in item.pieces(sources, rank, split):
                writer.tensor(place, offset, piece)
            key = extra_state_key(item, model)
            if key is not None and rank == 0:
                writer.nothing(key)
    return [_row(block) for block in writer.blocks]


def _write_hf(
    source: Path, described: Path, dtype: str | None, file: BinaryIO, shard: Shard
) -> list[str]:
    """One safetensors file of numbers in the table; the names of its tensors."""
    model, table = _model(described)
    reader = TorchDistReader(source)
    header: dict[str, tuple[Shape, torch.dtype]] = {}
    for number in shard.content:
        item = table[number]
        kept = reader.dtype(place_in_checkpoint(item, model))
        for name, shape in zip(item.sources, item.shapes, strict=True):
            if dtype == FP8 and fp8_blocks.is_quantized(item):
                header[name] = shape, torch.float8_e4m3fn
                header[name + fp8_blocks.SCALE] = fp8_blocks.scale_shape(shape), torch.float32
            else:
                header[name] = shape, _kept_or(kept, dtype)
    items = (table[number] for number in shard.content)
    write_safetensors(file, header, _exported(reader, items, model, dtype))
    return list(header)


def _exported(
    reader: TorchDistReader, items: Iterator[WeightMap], model: ModelShape, dtype: str | None
) -> Iterator[tuple[str, Tensor]]:
    for item in items:
        full = reader.read(place_in_checkpoint(item, model), item.full_shape)
        for name, tensor in zip(item.sources, item.to_hf(full), strict=True):
            _check_values(name, tensor, None, reader.path)
            if dtype == FP8 and fp8_blocks.is_quantized(item):
                values, scales = fp8_blocks.quantize(tensor)
                fp8_blocks.check(name, tensor, values, scales)
                yield name, values
                yield name + fp8_blocks.SCALE, scales
            else:
                yield name, tensor.to(_kept_or(tensor.dtype, dtype))


def _kept_or(kept: torch.dtype, dtype: str | None) -> torch.dtype:
    """What a tensor that is not quantized is stored as."""
    if dtype is None:
        return kept
    return torch.bfloat16 if dtype == FP8 else DTYPES[dtype]


def _check_layout(model: ModelShape, layout: Layout) -> None:
    """ConfigError unless the layout divides the model."""
    if layout.expert > 1 and not model.num_experts:
        raise ConfigError(f"--expert-parallel {layout.expert}, but the model has no experts; use 1")
    sizes = [("--tensor-parallel", layout.tensor, *size) for size in split_sizes(model).items()]
    sizes.append(("--pipeline-parallel", layout.pipeline, "num_hidden_layers", model.num_layers))
    sizes.append(("--expert-parallel", layout.expert, "num_experts", model.num_experts))
    wrong = [
        f"the model's {name}={size} is not a multiple of {option} {parts}; choose a divisor"
        for option, parts, name, size in sizes
        if size % parts
    ]
    if wrong:
        raise ConfigError("this layout cannot work:\n" + "\n".join(f"  {w}" for w in wrong))


def _entries(
    table: Sequence[WeightMap], model: ModelShape, layout: Layout
) -> dict[int, list[tuple[int, int]]]:
    """By rank that would hold it, (number in the table, tensor-parallel rank) of each part."""
    ranks = max(layout.tensor, layout.expert)  # of a pipeline stage without replicas
    found: dict[int, list[tuple[int, int]]] = {n: [] for n in range(ranks * layout.pipeline)}
    for number, item in enumerate(table):
        if item.tied:
            continue
        stage, _ = place_of(item, model.num_layers, layout.pipeline)
        if item.expert is not None:
            holder = item.expert * layout.expert // model.num_experts
            found[stage * ranks + holder].append((number, 0))
            continue
        for rank in range(1 if item.split_axis is None else layout.tensor):
            found[stage * ranks + rank].append((number, rank))
    return found


def _groups(things: Sequence[Any], weights: Sequence[int], limit: int) -> list[list[Any]]:
    """In order, as many together as ``limit`` bytes hold."""
    groups: list[list[Any]] = []
    size = limit
    for thing, weight in zip(things, weights, strict=True):
        if size + weight > limit:
            groups.append([])
            size = 0
        groups[-1].append(thing)
        size += weight
    return groups


def _model(folder: Path) -> tuple[ModelShape, tuple[WeightMap, ...]]:
    model = model_shape(load_config(folder))
    return model, weight_table(model)


def _config_folder(source: Path, config: Path | None) -> Path:
    folder = source if config is None else config
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; give the model's Hugging Face folder with --config (its "
            "weights are not read)"
        )
    return folder


def _stated_dtype(source: Path) -> torch.dtype | None:
    """The dtype config.json gives, None if it gives none."""
    stated = getattr(load_config(source), "dtype", None)
    return getattr(torch, stated) if isinstance(stated, str) else stated


def _check_values(name: str, tensor: Tensor, stated: torch.dtype | None, where: Path) -> None:
    if stated is not None and tensor.dtype != stated:
        raise CheckpointError(
            f"tensor {name} in {where} is {tensor.dtype}, config.json says {stated}; give --dtype "
            "to convert all to one"
        )
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(torch.stack((low, high))).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"tensor {name} in {where} has {bad} values that are NaN or infinite; the file is "
            "damaged or training diverged"
        )


def _check_filled(blocks: Sequence[Block]) -> None:
    """Every stored tensor is filled by its blocks, which lie where they do not overlap."""
    filled: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for block in blocks:
        if block.sizes is not None and block.shape is not None:
            filled[block.key] = filled.get(block.key, 0) + prod(block.sizes)
            wanted[block.key] = prod(block.shape)
    wrong = sorted(key for key, count in wanted.items() if filled[key] != count)
    assert not wrong, f"parameters not set whole: {wrong}"


def _row(block: Block) -> dict[str, Any]:
    row = asdict(block)
    return row | {"dtype": str(block.dtype).removeprefix("torch.") if block.dtype else None}


def _block(file: str, row: Mapping[str, Any]) -> Block:
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    dtype = getattr(torch, row["dtype"]) if row["dtype"] else None
    return Block(**as_tuples | {"dtype": dtype, "file": file})


def _bytes(item: WeightMap, sizes: Mapping[str, int]) -> int:
    return sum(sizes[name] for name in item.sources)


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file of weights: whether the source is still what it was."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
