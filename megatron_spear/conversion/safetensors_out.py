"""A safetensors file written tensor by tensor; the library's own writer wants all in memory.

The format (huggingface.co/docs/safetensors): 8 bytes with the length of the header, the header in
JSON with each tensor's dtype, shape and place, then the tensors' bytes in the header's order.
"""

import json
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_spear.conversion.mapping import Shape

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ALIGN = 8


def write_safetensors(
    file: BinaryIO,
    described: Mapping[str, tuple[Shape, torch.dtype]],
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """Write ``tensors``, which must come in the order of ``described`` and be what it says."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in described.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, tensor), (wanted, (shape, dtype)) in zip(tensors, described.items(), strict=True):
        assert (name, tuple(tensor.shape), tensor.dtype) == (wanted, tuple(shape), dtype)
        file.write(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
