"""Rows of parquet files, of DAPO-Math-17k's each index once (needs pyarrow, in the extra
``math``)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_spear.errors import DataError

_COLUMNS = ("prompt", "reward_model", "extra_info")
_ROWS_AT_ONCE = 65_536


def parquet_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(1-based number, row) of the first row of each ``extra_info.index``, or of each row where the
    file has no such column.

    Only the first of equal rows becomes Python objects: the published 1.8 million rows hold 17
    thousand problems. Raises DataError for a file that is no parquet, or has other columns.
    """
    pyarrow = _pyarrow(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = _columns(file, table.schema_arrow.names)
            seen: set[Any] = set()
            first = 1
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=columns):
                numbers = _new(_indices(batch), seen, batch.num_rows)
                rows = batch.take(pyarrow.array(numbers, pyarrow.int64())).to_pylist()
                yield from ((first + at, row) for at, row in zip(numbers, rows, strict=True))
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: cannot be read as parquet ({error}); copy or fetch it again"
        ) from None


def table_rows(file: Path, column: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(1-based number, row with ``column`` alone) of each row; DataError where there is none."""
    pyarrow = _pyarrow(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise DataError(
                    f"{file}: has the columns {', '.join(names)}, and no {column}; fetch another "
                    "file, or rename it"
                )
            first = 1
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                yield from enumerate(batch.to_pylist(), first)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: cannot be read as parquet ({error}); copy or fetch it again"
        ) from None


def _pyarrow(file: Path) -> Any:
    """The library; DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{file}: reading parquet needs pyarrow, which is not installed; "
            "pip install 'megatron-spear[math]'"
        ) from None
    return pyarrow


def _columns(file: Path, names: list[str]) -> list[str]:
    """The columns to read: those of DAPO-Math-17k, else of a table of problems and answers."""
    if "prompt" in names:
        missing = sorted({"reward_model"} - set(names))
        if missing:
            raise DataError(
                f"{file}: has the columns {', '.join(names)}, and no {', '.join(missing)}; "
                "expected those of DAPO-Math-17k: data_source, prompt, ability, reward_model, "
                "extra_info"
            )
        return [name for name in _COLUMNS if name in names]
    return [name for name in ("id", "problem", "question", "answer") if name in names] or names


def _indices(batch: Any) -> list[Any] | None:
    """``extra_info.index`` of each row; None where the table has none."""
    import pyarrow

    if "extra_info" not in batch.schema.names:
        return None
    column = batch.column("extra_info")
    if not pyarrow.types.is_struct(column.type) or column.type.get_field_index("index") < 0:
        return None
    indices: list[Any] = column.field("index").to_pylist()
    return indices


def _new(indices: list[Any] | None, seen: set[Any], num_rows: int) -> list[int]:
    """The rows of a batch whose index was not seen before; a row without one is always new."""
    if indices is None:
        return list(range(num_rows))
    new = []
    for at, index in enumerate(indices):
        if index is None or index not in seen:
            new.append(at)
            seen.add(index)
    return new
