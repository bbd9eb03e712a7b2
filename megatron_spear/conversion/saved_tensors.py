"""Tensors that ``torch.save`` wrote into the middle of a file, without copying them into memory.

torch can map a saved file, but not a part of one. What it writes is a zip archive with a pickle,
which says how a tensor is made of a storage, and the storage's bytes, not compressed.
"""

import io
import mmap
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "ByteStorage": torch.uint8,
}
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a file in a zip archive: lengths of its name and of what comes between it and the content."""


def mapped(path: Path) -> memoryview:
    """The file as memory, read from disk where it is looked at; written to, it stays as it is."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def saved_tensor(content: memoryview, start: int, length: int) -> Tensor:
    """The tensor saved in these bytes of a mapped file; it shares the file's memory.

    Raises what zipfile, pickle and torch raise for bytes that are something else.
    """
    part = content[start : start + length]
    if len(part) < length:
        raise EOFError(f"the file ends {length - len(part)} bytes too early")
    with zipfile.ZipFile(_Reader(part)) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    made = _Recipe(bytes(_content(part, entries["data.pkl"]))).load()
    dtype, name = made["storage"]
    values = torch.frombuffer(_content(part, entries[f"data/{name}"]), dtype=dtype)
    return values.as_strided(made["size"], made["stride"], made["offset"])


def _content(archive: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """A stored file's bytes; their checksums are not looked at, since torch may write none."""
    assert entry.compress_type == zipfile.ZIP_STORED, "torch does not compress"
    lengths = _LOCAL_HEADER.unpack_from(archive, entry.header_offset)
    begin = entry.header_offset + _LOCAL_HEADER.size + sum(lengths)
    return archive[begin : begin + entry.file_size]


class _Recipe(pickle.Unpickler):
    """Reads how the tensor is made; knows nothing but what such a pickle of a tensor has."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _made_of
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        _, dtype, name, _, _ = pid
        return dtype, name


def _made_of(
    storage: tuple[torch.dtype, str], offset: int, size: Any, stride: Any, *rest: Any
) -> dict[str, Any]:
    return {"storage": storage, "offset": offset, "size": size, "stride": stride}


class _Reader(io.RawIOBase):
    """Memory as a file, without the copy that ``BytesIO`` makes."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self._content, self._at = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._content)}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._content[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
