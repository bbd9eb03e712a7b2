"""Tensors in the middle of a file: the same as torch.load gives, and not copied."""

import io
import pickle
from pathlib import Path

import pytest
import torch

from megatron_spear.conversion.saved_tensors import mapped, saved_tensor

BEFORE = b"other bytes"


def found(value: object, path: Path) -> torch.Tensor:
    """``value``, saved between other bytes of a file, read again."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(BEFORE + buffer.getvalue() + b"more")
    return saved_tensor(mapped(path), len(BEFORE), len(buffer.getvalue()))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
)
def test_equals_what_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(60).view(3, 4, 5).to(dtype)
    read = found(tensor, tmp_path / "f")
    assert read.dtype == dtype and torch.equal(read, tensor)


def test_views_and_empty_tensors(tmp_path: Path) -> None:
    whole = torch.arange(20.0).view(4, 5)
    for number, tensor in enumerate((whole.T, whole[1:, ::2], torch.tensor(3.5))):
        assert torch.equal(found(tensor, tmp_path / str(number)), tensor)


def test_it_shares_the_files_memory_and_leaves_the_file_alone(tmp_path: Path) -> None:
    tensor = torch.arange(1000.0)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    (tmp_path / "f").write_bytes(buffer.getvalue())
    content = mapped(tmp_path / "f")
    one, other = (saved_tensor(content, 0, len(content)) for _ in range(2))
    one[0] = 7.0
    assert other[0] == 7.0
    assert (tmp_path / "f").read_bytes() == buffer.getvalue()


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"is no part of a plain tensor"):
        found({"path": Path("x")}, tmp_path / "f")
    (tmp_path / "short").write_bytes(b"PK")
    with pytest.raises(EOFError, match="ends 8 bytes too early"):
        saved_tensor(mapped(tmp_path / "short"), 0, 10)
