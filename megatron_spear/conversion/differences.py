"""By how much two checkpoints differ, tensor by tensor: what training, rounding or damage changed.

Both may be of any kind: Hugging Face folders (compared by their own names, whatever the model),
``torch_dist`` folders (by theirs, a layer at a time, the optimizer's state too), or one of each (by
Hugging Face names). One tensor of each side is in memory at a time, and sums are taken over pieces
of it. ``verify`` is for the other question: whether two checkpoints hold the same model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape, load_config, model_shape
from megatron_spear.conversion.torch_dist import (
    METADATA,
    Place,
    TorchDistReader,
    place_in_checkpoint,
)
from megatron_spear.errors import CheckpointError

OPTIMIZER = "optimizer."
_LAYERS = "decoder.layers."
_EXPERTS = ".mlp.experts.experts."
_VOCABULARIES = ("embedding.word_embeddings.weight", "output_layer.weight")
_PIECE = 1 << 22
"""Values that are compared at once (in float64: 32 MiB)."""

Side = Mapping[str, Callable[[], Tensor]]
"""What a checkpoint holds: by name, what reads the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorChange:
    """How a tensor of the second checkpoint differs from that of the first.

    ``max_abs`` and ``mean_abs`` are of |second - first|; the norms are those of the difference and
    of the first tensor, NaN if either has a NaN where the other has none. ``bitwise`` says that
    dtype and every bit agree (then a NaN is no difference).
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    bitwise: bool
    num_changed: int
    max_abs: float
    mean_abs: float
    norm: float
    first_norm: float

    @property
    def relative(self) -> float:
        """Norm of the difference by that of the first tensor; infinite for one of zeros."""
        if self.norm == 0.0:
            return 0.0
        return self.norm / self.first_norm if self.first_norm else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Misfit:
    """A tensor that both have and that cannot be compared, and why."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """Names of one side alone, what cannot be compared, and each compared tensor.

    ``padded`` are vocabularies that the two layouts pad to another number of rows; the rows that
    both have are compared.
    """

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    misfits: tuple[Misfit, ...]
    padded: tuple[str, ...]
    changes: tuple[TensorChange, ...]

    @property
    def equal(self) -> bool:
        """Whether the checkpoints have the same tensors, bit by bit."""
        nothing_else = not (self.only_first or self.only_second or self.misfits)
        return nothing_else and all(change.bitwise for change in self.changes)

    def relative(self, *, optimizer: bool) -> float:
        """The relative change of all weights, or of the optimizer's state, as one vector."""
        own = [c for c in self.changes if c.name.startswith(OPTIMIZER) == optimizer]
        before = math.hypot(*(change.first_norm for change in own))
        after = math.hypot(*(change.norm for change in own))
        return after / before if before else (math.inf if after else 0.0)


def find_differences(first: Path, second: Path, *, config: Path | None = None) -> Differences:
    """Compare two checkpoints; see above.

    ``config`` is the model's Hugging Face folder, needed where a ``torch_dist`` folder meets a
    Hugging Face one without config.json. Raises CheckpointError for a folder that is neither, and
    for what cannot be read at all.
    """
    kinds = [_is_torch_dist(path) for path in (first, second)]
    if kinds[0] == kinds[1]:
        one, other = (_own_names(path) for path in (first, second))
    else:
        one, other = (
            _hf_names(path, _config_of(first, second, config)) for path in (first, second)
        )
    changes: list[TensorChange] = []
    misfits: list[Misfit] = []
    padded: list[str] = []
    both_dist = all(kinds)
    for name in sorted(set(one) & set(other), key=_natural):
        found = _compared(name, one[name], other[name], padded if both_dist else None)
        if isinstance(found, Misfit):
            misfits.append(found)
        else:
            changes.append(found)
    return Differences(
        only_first=tuple(sorted(set(one) - set(other), key=_natural)),
        only_second=tuple(sorted(set(other) - set(one), key=_natural)),
        misfits=tuple(misfits),
        padded=tuple(padded),
        changes=tuple(changes),
    )


def change_of(name: str, first: Tensor, second: Tensor) -> TensorChange:
    """The statistics of two tensors of one shape, in float64.

    Example: [3, 4] and [3, 5] have max 1, mean 0.5, norm 1, first norm 5, relative change 0.2.
    """
    same = first.dtype == second.dtype
    changed, largest, total, squares, before = 0, 0.0, 0.0, 0.0, 0.0
    for one, other in _pieces(first, second):
        same = same and torch.equal(_bits(one), _bits(other))
        a = one.double()
        off = (other.double() - a).abs()
        changed += int((off != 0).sum())
        largest = max(largest, float(off.max()), key=lambda v: (math.isnan(v), v))
        total += float(off.sum())
        squares += float(off.square().sum())
        before += float(a.square().sum())
    if same:  # equal infinities and NaNs would make NaNs
        changed, largest, total, squares = 0, 0.0, 0.0, 0.0
    return TensorChange(
        name=name,
        shape=tuple(first.shape),
        dtypes=(_word(first.dtype), _word(second.dtype)),
        bitwise=same,
        num_changed=changed,
        max_abs=largest,
        mean_abs=total / max(first.numel(), 1),
        norm=math.sqrt(squares),
        first_norm=math.sqrt(before),
    )


def _compared(
    name: str,
    one: Callable[[], Tensor],
    other: Callable[[], Tensor],
    padded: list[str] | None,
) -> TensorChange | Misfit:
    """The change, or why there is none; a padded vocabulary is added to ``padded``, if given."""
    try:
        first, second = one(), other()
    except CheckpointError as error:
        return Misfit(name=name, why=str(error))
    if (
        padded is not None
        and name.endswith(_VOCABULARIES)
        and first.shape[1:] == second.shape[1:]
        and len(first) != len(second)
    ):
        padded.append(f"{name}: {len(first)} and {len(second)} rows")
        rows = min(len(first), len(second))
        first, second = first[:rows], second[:rows]
    if first.shape != second.shape:
        return Misfit(name=name, why=f"shapes {tuple(first.shape)} and {tuple(second.shape)}")
    return change_of(name, first, second)


def _pieces(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat = (first.reshape(-1), second.reshape(-1))
    for start in range(0, first.numel(), _PIECE):
        yield flat[0][start : start + _PIECE], flat[1][start : start + _PIECE]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_torch_dist(path: Path) -> bool:
    return (path / METADATA).is_file()


def _own_names(path: Path) -> Side:
    """Every tensor of a folder by its own name."""
    if not _is_torch_dist(path):
        hf = HfReader(path)
        return {name: partial(hf.get, name) for name in hf.names}
    reader = TorchDistReader(path)
    side: dict[str, Callable[[], Tensor]] = {}
    for key, shape in reader.tensors.items():
        depth = (2 if _EXPERTS in key else 1) if _LAYERS in key and len(shape) > 1 else 0
        for index in _indices(shape[:depth]):
            place = Place(key=key, index=index, shape=shape)
            side[_with_index(key, index)] = partial(reader.read, place, shape[depth:])
    return side


def _indices(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    for at in range(sizes[0]):
        for rest in _indices(sizes[1:]):
            yield (at, *rest)


def _with_index(key: str, index: tuple[int, ...]) -> str:
    """``decoder.layers.3.mlp...`` of the stacked tensor's key and the layer (and the expert)."""
    if not index:
        return key
    key = key.replace(_LAYERS, f"{_LAYERS}{index[0]}.", 1)
    return key.replace(_EXPERTS, f"{_EXPERTS}{index[1]}.", 1) if len(index) > 1 else key


def _hf_names(path: Path, config: Path) -> Side:
    """The weights of a folder of either kind by their Hugging Face names."""
    if not _is_torch_dist(path):
        return _own_names(path)
    model, reader = model_shape(load_config(config)), TorchDistReader(path)
    side: dict[str, Callable[[], Tensor]] = {}
    for item in weight_table(model):
        if item.tied:
            continue
        for number, name in enumerate(item.sources):
            side[name] = partial(_of_item, reader, item, model, number)
    return side


def _of_item(reader: TorchDistReader, item: WeightMap, model: ModelShape, number: int) -> Tensor:
    """One of the Hugging Face tensors that a Megatron parameter holds."""
    full = reader.read(place_in_checkpoint(item, model), item.full_shape)
    return item.to_hf(full)[number]


def _config_of(first: Path, second: Path, config: Path | None) -> Path:
    for path in (config, first, second):
        if path is not None and (path / "config.json").is_file():
            return path
    raise CheckpointError(
        f"neither {first} nor {second} has a config.json; give the model's folder with --config"
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(not w.isdigit(), int(w) if w.isdigit() else 0, w) for w in name.split(".")]
