"""Read and write Hugging Face model folders, one tensor at a time.

Reading maps the safetensors files into memory and touches only what is asked for; every way in
which a folder can be broken is a CheckpointError that names the file or the tensor.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.errors import CheckpointError
from megatron_spear.files import disk_full_behind, sync_file, sync_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 4 * 2**30
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class HfReader:
    """Lazy access to the tensors of a folder; a context manager.

    Raises CheckpointError for a missing folder, a shard that the index names and is not there, a
    truncated shard, and tensors that the index names and its shard does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path} is not a folder; expected a Hugging Face model folder")
        self._files = self._index()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> "HfReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the folder."""
        return tuple(self._files)

    def num_bytes(self, name: str) -> int:
        """Size of a tensor of the folder."""
        part = self._open(self._files[name]).get_slice(name)
        bits = int("".join(filter(str.isdigit, part.get_dtype().partition("_")[0])))  # F8_E4M3
        return int(math.prod(part.get_shape())) * bits // 8

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor; CheckpointError if it is missing or has another shape than expected."""
        if name not in self._files:
            raise CheckpointError(
                f"tensor {name} is missing in {self.path}; it has {len(self._files)} tensors, and "
                "the model described by its config.json needs this one"
            )
        handle = self._open(self._files[name])
        try:
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"tensor {name} cannot be read from {self.path / self._files[name]}: {error}"
            ) from error
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"tensor {name} in {self.path} has shape {tuple(tensor.shape)}; expected "
                f"{tuple(shape)} from config.json"
            )
        return tensor

    def _index(self) -> dict[str, str]:
        index, single = self.path / INDEX, self.path / SINGLE
        if index.is_file():
            try:
                files = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index} cannot be read: {error!r}") from error
            missing = sorted({f for f in files.values() if not (self.path / f).is_file()})
            if missing:
                raise CheckpointError(
                    f"{index} names {', '.join(missing)}, which {self.path} does not have; "
                    "copy or download the missing shards"
                )
            return files
        if not single.is_file():
            raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}")
        self._handles = {}
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.path / file} is truncated or not a safetensors file "
                    f"({self.path.joinpath(file).stat().st_size} bytes): {error}; "
                    "copy or download it again"
                ) from error
        return self._handles[file]


def check_complete(reader: HfReader, table: Iterable[WeightMap], also: Iterable[str] = ()) -> None:
    """No tensor left: each tensor of the folder is named by the table, and the other way round.

    A tied output embedding may be stored once more as ``lm_head.weight``; that copy is allowed, and
    so are the names ``also``.
    """
    maps = tuple(table)
    wanted = {name for item in maps for name in item.sources}
    allowed = {"lm_head.weight", *also} if any(item.tied for item in maps) else set(also)
    allowed |= {name for name in reader.names if name.endswith("rotary_emb.inv_freq")}
    missing = sorted(wanted - set(reader.names))
    extra = sorted(set(reader.names) - wanted - allowed)
    if missing:
        raise CheckpointError(
            f"{reader.path} lacks {len(missing)} tensors that its config.json calls for: "
            f"{_some(missing)}"
        )
    if extra:
        raise CheckpointError(
            f"{reader.path} has {len(extra)} tensors that the model does not use: {_some(extra)}; "
            "the config.json may be of another model"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """CheckpointError if the folder's tokenizer can produce ids the model has no embedding for."""
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no tokenizer.json; copy the model's tokenizer there")
    try:
        tokenizer = Tokenizer.from_buffer(file.read_bytes())  # from_file raises plain Exceptions
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {path} has ids up to {largest}, the model has vocab_size "
            f"{vocab_size}; they do not belong together"
        )


def write_hf_folder(
    target: Path,
    source: Path,
    weights: Iterable[tuple[str, Tensor | None]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantization: Mapping[str, Any] | None = None,
    flush: bool = False,
) -> None:
    """Write ``weights``, ``source``'s config and tokenizer as a folder transformers can load.

    ``weights`` is a stream such as ``MegatronPolicy.export_weights()``; entries without a tensor
    are passed over. Files appear under a temporary name and are put in place at the end, so a
    folder is whole or not there; with ``flush`` also after a power cut, and for readers on other
    machines. ``quantization`` is config.json's ``quantization_config``. Raises CheckpointError if
    ``target`` exists and is not an empty folder, and if the disk is full.
    """
    target, source = Path(target), Path(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; give another folder")
    work = target.with_name(f".{target.name}.writing-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with full_disk_told(target):
            work.mkdir(parents=True)
            dtype = _write_shards(work, weights, max_shard_bytes)
            write_description(work, source, dtype, quantization)
            if flush:
                for file in work.iterdir():
                    sync_file(file)
                sync_folder(work)
            if target.exists():
                target.rmdir()
            work.replace(target)
            if flush:
                sync_folder(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def full_disk_told(target: Path, kept: Path | None = None) -> Iterator[None]:
    """A full disk while ``target`` is written is a CheckpointError, whichever library wrote.

    ``kept`` is where what was written stays, to go on from.
    """
    try:
        yield
    except Exception as error:
        cause = disk_full_behind(error)
        if cause is None:
            raise
        then = (
            f"{kept} has what was finished; free some space and give the same command again"
            if kept
            else "nothing is left of it. Free some space and start again, a run that has "
            "checkpoints with resume=DIR"
        )
        raise CheckpointError(
            f"{target} was not written: the disk is full or a quota is reached ({cause}); {then}"
        ) from error


def _write_shards(
    work: Path, weights: Iterable[tuple[str, Tensor | None]], max_shard_bytes: int
) -> torch.dtype:
    files: list[tuple[Path, list[str]]] = []
    total, dtype = 0, None
    for shard in _shards(weights, max_shard_bytes):
        file = work / f"shard-{len(files)}"
        save_file(shard, file, metadata={"format": "pt"})
        files.append((file, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
        dtype = dtype or next(iter(shard.values())).dtype  # the embedding's: it is never quantized
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(files, 1):
        name = shard_name(number, len(files))
        file.rename(work / name)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        write_index(work, weight_map, total)
    return dtype or torch.float32


def _shards(
    weights: Iterable[tuple[str, Tensor | None]], max_shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        if tensor is None:
            continue
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def write_description(
    work: Path, source: Path, dtype: torch.dtype, quantization: Mapping[str, Any] | None = None
) -> None:
    """``source``'s config, for weights of ``dtype``, and tokenizer into ``work``."""
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, work / name)


def write_index(work: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """The file that says which shard has which tensor."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    (work / INDEX).write_text(json.dumps(index, indent=2))


def shard_name(number: int, count: int) -> str:
    """Name of shard ``number`` (from 1) of ``count``."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
