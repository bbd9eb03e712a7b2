"""Tensors out of untrusted bytes: pickles with an allow-list, and flattened buckets.

A pickle may only rebuild tensors of the CPU and plain values. Nothing it names is imported, so that
no payload can run code here. Torch cannot load a plain pickle of float8 tensors at all; they travel
in flattened buckets.
"""

import base64
import binascii
import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megatron_spear.errors import EngineError

NamedTensors = list[tuple[str, torch.Tensor]]


def _storage(raw: bytes) -> Any:
    """The storage in the bytes that torch pickles one as; torch's own reader runs any code."""
    storage = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
    if not isinstance(storage, torch.storage.TypedStorage):
        raise EngineError(f"a payload has {type(storage).__name__} in the place of a storage")
    return storage


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    ("types", "SimpleNamespace"): SimpleNamespace,
    # SGLang's own records of a bucket, which are not installed here.
    ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"): SimpleNamespace,
}
_SHARED_MEMORY = ("torch.multiprocessing.reductions", "multiprocessing.resource_sharer")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        more = ""
        if module in _SHARED_MEMORY:
            more = (
                "; this server takes plain pickles, not tensors in shared memory (ForkingPickler)"
            )
        raise EngineError(f"Blocked unsafe global ({module}.{name}) in a payload{more}")


def decoded(payload: Any) -> Any:
    """The object of one base64 payload; EngineError where it is none that may be loaded."""
    try:
        raw = base64.b64decode(payload, validate=True)
        return _Unpickler(io.BytesIO(raw)).load()
    except (TypeError, binascii.Error) as error:
        raise EngineError(f"a payload is not base64: {error}") from None
    except EngineError:
        raise
    # A pickle that is cut off or made up can raise anything its opcodes can.
    except Exception as error:  # noqa: BLE001
        raise EngineError(
            f"a payload is no pickle that can be read: {type(error).__name__}: {error}"
        ) from None


def named_tensors(payload: Any) -> NamedTensors:
    """The list of (name, tensor) of a payload."""
    found = decoded(payload)
    if not isinstance(found, list | tuple) or not all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], torch.Tensor)
        for pair in found
    ):
        raise EngineError("a payload holds no list of (name, tensor)")
    return [(name, tensor) for name, tensor in found]


def bucket_of(payload: Any) -> NamedTensors:
    """The tensors of a payload ``{"flattened_tensor", "metadata"}``."""
    found = decoded(payload)
    if not isinstance(found, dict) or set(found) != {"flattened_tensor", "metadata"}:
        raise EngineError('a payload holds no {"flattened_tensor", "metadata"}')
    flat, records = found["flattened_tensor"], found["metadata"]
    if not isinstance(flat, torch.Tensor) or flat.dtype != torch.uint8 or flat.dim() != 1:
        raise EngineError("flattened_tensor is no uint8 tensor [bytes]")
    tensors = []
    for record in records:
        try:
            name, dtype, shape = record.name, record.dtype, tuple(record.shape)
            start, stop = record.start_idx, record.end_idx
        except (AttributeError, TypeError) as error:
            raise EngineError(f"a bucket's metadata is incomplete: {error}") from None
        tensors.append((name, slice_of(flat, name, dtype, shape, start, stop)))
    return tensors


def sizes_of(dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]) -> list[int]:
    """Bytes of each tensor."""
    return [
        torch.Size(shape).numel() * dtype.itemsize
        for dtype, shape in zip(dtypes, shapes, strict=True)
    ]


def slice_of(
    flat: torch.Tensor, name: str, dtype: torch.dtype, shape: Sequence[int], start: int, stop: int
) -> torch.Tensor:
    """A tensor out of the bytes ``start`` to ``stop`` of a bucket, a view."""
    (size,) = sizes_of([dtype], [shape])
    if not 0 <= start <= stop <= len(flat) or stop - start != size:
        raise EngineError(
            f"{name} is said to be bytes {start} to {stop} of {len(flat)}; {dtype} "
            f"{list(shape)} has {size}"
        )
    if start % dtype.itemsize:
        raise EngineError(
            f"{name} begins at byte {start}, no multiple of its {dtype.itemsize} bytes a value; "
            "order mixed dtypes by size, the largest first"
        )
    return flat[start:stop].view(dtype).view(*shape)


def dtype_of(name: str) -> torch.dtype:
    """``float32`` or ``torch.float32`` as a dtype."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise EngineError(f"dtype {name!r} is not one of torch's")
    return dtype
