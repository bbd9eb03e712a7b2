"""Whether two checkpoints hold the same model: Hugging Face folders or torch_dist ones, any pair.

Tensors are compared by their Hugging Face names, one at a time: shapes and every bit. Where dtypes
differ, the finer tensor is rounded first; what is in FP8 blocks is compared by what rounding
allows. Both are counted apart.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_spear.conversion import fp8_blocks
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.hf_io import HfReader, check_complete
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape, load_config, model_shape
from megatron_spear.conversion.torch_dist import METADATA, TorchDistReader, place_in_checkpoint
from megatron_spear.errors import CheckpointError

EQUAL, ROUNDED, QUANTIZED = "equal", "rounded", "quantized"


class _Weights(Protocol):
    def get(self, item: WeightMap) -> Mapping[str, Tensor]:
        """By name, the tensors of an item, and what belongs to them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What was compared, and each difference as a line."""

    num_tensors: int
    num_rounded: int
    """Equal once the finer one is rounded to the other's dtype."""
    num_quantized: int
    """Off by no more than FP8 rounding explains."""
    differences: tuple[str, ...]


def compare(first: Path, second: Path, *, config: Path | None = None) -> Comparison:
    """Compare two checkpoints of one model.

    ``config`` is the model's Hugging Face folder where neither has a config.json. Raises
    CheckpointError for what cannot be read.
    """
    with_config = [p for p in (config, first, second) if p and (p / "config.json").is_file()]
    if not with_config:
        raise CheckpointError(
            f"neither {first} nor {second} has a config.json; give the model's folder with --config"
        )
    model = model_shape(load_config(with_config[0]))
    table = weight_table(model)
    sides: list[_Weights] = [
        _Megatron(path, model) if (path / METADATA).exists() else _HuggingFace(path, table)
        for path in (first, second)
    ]
    found: Counter[str] = Counter()
    lines: list[str] = []
    for item in table:
        if item.tied:
            continue
        one, other = (side.get(item) for side in sides)
        for name in item.sources:
            verdict = _verdict(name, one, other)
            found[verdict] += 1
            if verdict not in (EQUAL, ROUNDED, QUANTIZED):
                lines.append(verdict)
    return Comparison(
        num_tensors=found.total(),
        num_rounded=found[ROUNDED],
        num_quantized=found[QUANTIZED],
        differences=tuple(lines),
    )


def _verdict(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """EQUAL, ROUNDED, QUANTIZED, or a line that says what is different."""
    a, b, scale = one[name], other[name], name + fp8_blocks.SCALE
    if a.shape != b.shape:
        return f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if (scale in one) != (scale in other):
        exact, stored = (b, one) if scale in one else (a, other)
        try:
            fp8_blocks.check(name, exact, stored[name], stored[scale])
        except CheckpointError as error:
            return str(error)
        return QUANTIZED
    if scale in one and not torch.equal(one[scale], other[scale]):
        return f"{name}{fp8_blocks.SCALE}: scales differ"
    verdict = EQUAL
    if a.dtype != b.dtype:
        coarse = min((a.dtype, b.dtype), key=lambda dtype: dtype.itemsize)
        a, b, verdict = a.to(coarse), b.to(coarse), ROUNDED
    if not torch.equal(_bits(a), _bits(b)):
        off = (a.double() - b.double()).abs()
        wrong = int((off != 0).sum())
        return f"{name}: {wrong} of {a.numel()} values differ, by up to {off.max().item():.3g}"
    return verdict


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class _HuggingFace:
    """Scales of FP8 blocks come with the tensors they belong to."""

    def __init__(self, path: Path, table: Sequence[WeightMap]) -> None:
        self._reader = HfReader(path)
        sources = {name + fp8_blocks.SCALE for item in table for name in item.sources}
        check_complete(self._reader, table, also=sources)

    def get(self, item: WeightMap) -> Mapping[str, Tensor]:
        names = set(self._reader.names)
        found = {name: self._reader.get(name) for name in item.sources}
        scales = (name + fp8_blocks.SCALE for name in item.sources)
        return found | {name: self._reader.get(name) for name in scales if name in names}


class _Megatron:
    def __init__(self, path: Path, model: ModelShape) -> None:
        self._model, self._reader = model, TorchDistReader(path)

    def get(self, item: WeightMap) -> Mapping[str, Tensor]:
        full = self._reader.read(place_in_checkpoint(item, self._model), item.full_shape)
        return dict(zip(item.sources, item.to_hf(full), strict=True))
