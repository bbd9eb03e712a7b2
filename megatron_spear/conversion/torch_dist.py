"""Model weights in Megatron's ``torch_dist`` checkpoints, written and read a tensor at a time.

Such a folder holds ``.distcp`` files of torch-saved tensors one after the other, ``.metadata`` (for
every tensor its global shape, its blocks, and where each block's bytes are), and Megatron's
``metadata.json`` and ``common.pt``. Blocks are found by where they lie in the whole tensor, so any
layout reads what any other wrote. Layers of a stack are one tensor with a first axis of layers
(and a second of experts); the norms before fused projections are named as TransformerEngine's
layers have them, which is what Megatron itself stores.

No Megatron is imported here: its own ``dist_checkpointing.load`` reads what is written.
"""

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_spear.conversion.mapping import Shape, WeightMap
from megatron_spear.conversion.saved_tensors import mapped, saved_tensor
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import padded_vocab
from megatron_spear.errors import CheckpointError

METADATA = ".metadata"
_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_NORMS = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
_DENSE_NORMS = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a Megatron parameter is stored: in the tensor ``key`` of ``shape``, at ``index`` of
    its first axes (layer, expert)."""

    key: str
    index: Shape
    shape: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A written block: of which tensor, from where on, how large, and where its bytes are.

    ``shape`` None marks an object without a tensor.
    """

    key: str
    offset: Shape | None
    sizes: Shape | None
    shape: Shape | None
    dtype: torch.dtype | None
    file: str
    start: int
    length: int


def place_in_checkpoint(item: WeightMap, model: ModelShape, tensor_parallel: int = 1) -> Place:
    """Key, index and whole shape; vocabularies padded to a multiple of ``tensor_parallel``.

    Example: ``mlp.linear_fc2.weight`` of layer 3 is at index (3,) of
    ``decoder.layers.mlp.linear_fc2.weight``.
    """
    shape = item.full_shape
    if item.stage != "layer":
        if len(shape) > 1:  # embedding and output layer
            shape = (padded_vocab(shape[0], tensor_parallel), *shape[1:])
        return Place(key=item.target, index=(), shape=shape)
    if item.expert is not None:
        return Place(
            key=f"decoder.layers.mlp.experts.experts.{item.target}",
            index=(item.layer, item.expert),
            shape=(model.num_layers, model.num_experts, *shape),
        )
    names = _NORMS if model.num_experts else _NORMS | _DENSE_NORMS
    key = f"decoder.layers.{names.get(item.target, item.target)}"
    return Place(key=key, index=(item.layer,), shape=(model.num_layers, *shape))


def extra_state_key(item: WeightMap, model: ModelShape) -> str | None:
    """The key of the empty object that Megatron stores beside each linear layer; None for others.

    A model of its layers asks for it when it is loaded.
    """
    module, _, kind = item.target.rpartition(".")
    if kind != "weight" or module.rpartition(".")[2] not in _LINEAR:
        return None
    place = place_in_checkpoint(item, model)
    sizes = place.shape[: len(place.index)]
    where = ".".join(map(str, place.index)) + "_" + ".".join(map(str, sizes))
    return f"{place.key.removesuffix('.weight')}._extra_state/shard_{where}"


class BlockWriter:
    """Appends blocks to one open ``.distcp`` file; ``blocks`` tells what it holds."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.blocks: list[Block] = []
        self._file, self._name = file, name

    def tensor(self, place: Place, offset: Shape, piece: Tensor) -> None:
        """Write ``piece``, which begins at ``offset`` of the parameter at ``place``."""
        depth = len(place.index)
        values = _own_storage(piece).reshape((1,) * depth + tuple(piece.shape))
        start, length = self._save(values)
        self.blocks.append(
            Block(
                key=place.key,
                offset=(*place.index, *offset),
                sizes=tuple(values.shape),
                shape=place.shape,
                dtype=piece.dtype,
                file=self._name,
                start=start,
                length=length,
            )
        )

    def nothing(self, key: str) -> None:
        """Write an empty object, as Megatron does: a list of what each copy has."""
        start, length = self._save([None])
        self.blocks.append(
            Block(
                key=key,
                offset=None,
                sizes=None,
                shape=None,
                dtype=None,
                file=self._name,
                start=start,
                length=length,
            )
        )

    def _save(self, value: Any) -> tuple[int, int]:
        """Without torch's own checksums, which take longer than the writing."""
        start, checksums = self._file.tell(), torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(value, self._file)
        finally:
            torch.serialization.set_crc32_options(checksums)
        return start, self._file.tell() - start


def _own_storage(tensor: Tensor) -> Tensor:
    """The same values in a storage of exactly their size: torch.save writes storages whole.

    Memory that is one block already, such as a slice of rows of a mapped file, is not copied.
    """
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes or not tensor.numel():
        return tensor
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(raw, dtype=tensor.dtype).reshape(tensor.shape)


def write_description(folder: Path, blocks: Sequence[Block]) -> None:
    """``.metadata``, ``common.pt`` and ``metadata.json`` of a folder with these blocks."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # part of the file format

    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, Any] = {}
    for block in blocks:
        where = _StorageInfo(block.file, block.start, block.length)
        if block.offset is None or block.sizes is None or block.shape is None:
            described[block.key] = BytesStorageMetadata()
            stored[MetadataIndex(block.key)] = where
            continue
        chunk = ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.sizes))
        if block.key not in described:
            described[block.key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=block.dtype),
                size=torch.Size(block.shape),
                chunks=[],
            )
        described[block.key].chunks.append(chunk)
        stored[MetadataIndex(block.key, torch.Size(block.offset))] = where
    torch.save({}, folder / "common.pt")
    about = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(about))
    with (folder / METADATA).open("wb") as file:
        pickle.dump(Metadata(state_dict_metadata=described, storage_data=stored), file)


class TorchDistReader:
    """The model weights of a ``torch_dist`` folder, whatever layout wrote it."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not (self.path / METADATA).is_file():
            raise CheckpointError(
                f"{path} has no {METADATA}; expected a torch_dist checkpoint of Megatron (a run "
                "keeps its own under checkpoints/step_N/policy)"
            )
        try:
            self._metadata = FileSystemReader(self.path).read_metadata()
        except Exception as error:
            raise CheckpointError(f"{self.path / METADATA} cannot be read: {error!r}") from error
        self._files: dict[str, memoryview] = {}

    @property
    def tensors(self) -> dict[str, Shape]:
        """Keys and whole shapes of everything stored as a tensor, an optimizer's state too."""
        described = self._metadata.state_dict_metadata
        return {k: tuple(d.size) for k, d in described.items() if hasattr(d, "chunks")}

    def dtype(self, place: Place) -> torch.dtype:
        """What the tensor is stored as."""
        found: torch.dtype = self._described(place).properties.dtype
        return found

    def read(self, place: Place, shape: Shape) -> Tensor:
        """The parameter at ``place``, of ``shape`` (a padded vocabulary is cut to it).

        Raises CheckpointError if it is not there, of another shape, or has holes.
        """
        described, depth = self._described(place), len(place.index)
        found = tuple(described.size)
        if not found and not shape:
            return self._block(place, described.chunks[0])
        wanted, padding = (*place.shape[:depth], *shape), 0 if depth else found[0] - shape[0]
        if padding < 0 or found != (wanted[0] + padding, *wanted[1:]):
            raise CheckpointError(
                f"{place.key} in {self.path} has shape {found}; expected {place.shape} from the "
                "model's config.json"
            )
        blocks = [
            chunk
            for chunk in described.chunks
            if all(
                offset <= at < offset + size
                for offset, at, size in zip(chunk.offsets, place.index, chunk.sizes, strict=False)
            )
        ]
        if len(blocks) == 1 and tuple(blocks[0].sizes[depth:]) == found[depth:]:
            return self._block(place, blocks[0])[: shape[0]]
        whole = torch.empty(found[depth:], dtype=described.properties.dtype)
        filled = 0
        for chunk in blocks:
            part = self._block(place, chunk)
            begins = chunk.offsets[depth:]
            region = tuple(slice(b, b + n) for b, n in zip(begins, part.shape, strict=True))
            whole[region] = part
            filled += part.numel()
        if filled != whole.numel():
            raise CheckpointError(
                f"{place.key}{list(place.index)} in {self.path} has {filled} of {whole.numel()} "
                "values: the checkpoint is not whole"
            )
        return whole[: shape[0]]

    def _described(self, place: Place) -> Any:
        found = self._metadata.state_dict_metadata.get(place.key)
        if found is None or not hasattr(found, "chunks"):
            raise CheckpointError(
                f"{place.key} is missing in {self.path}; it is a checkpoint of another model, or "
                "of other software"
            )
        return found

    def _block(self, place: Place, chunk: Any) -> Tensor:
        """One stored block, without the axes of layers and experts."""
        info = self._metadata.storage_data[MetadataIndex(place.key, chunk.offsets)]
        if info.relative_path not in self._files:
            try:
                self._files[info.relative_path] = mapped(self.path / info.relative_path)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} lacks {info.relative_path}, which its {METADATA} names; copy it "
                    "again"
                ) from error
        try:
            block = saved_tensor(self._files[info.relative_path], info.offset, info.length)
        except Exception as error:
            raise CheckpointError(
                f"{place.key} cannot be read from {self.path / info.relative_path}: {error}; the "
                "file is damaged or cut off"
            ) from error
        depth = len(place.index)
        inner = tuple(
            at - offset for at, offset in zip(place.index, chunk.offsets[:depth], strict=True)
        )
        return block[inner]
