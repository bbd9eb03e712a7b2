"""``metrics.jsonl``: the record of a run that is always there and always right.

One JSON object a line: ``{"step": 3, "time": 1760000000.5, "reward/mean": 0.25}``. A value that is
not finite is written as null. A step may have several lines (training, evaluation).
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_spear.files import write_whole

METRICS_FILE = "metrics.jsonl"
"""Its name in a run directory."""

log = logging.getLogger(__name__)


class LineFile:
    """A file of a JSON object a line that only grows.

    With ``resumed_step`` k what came after the checkpoint of step k is removed first, for the
    resumed run writes it again: the lines of later steps, the evaluation of step k, and a line cut
    off by a kill.

    A write that fails, on a full disk say, loses nothing: what is not in the file yet waits, from
    the very byte on, and the next ``append`` writes it first.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        self._path, self._resumed_step, self._waiting = path, resumed_step, b""
        self._file: FileIO | None = None

    def open(self) -> None:
        """Open the file, if it is not yet open. Raises OSError."""
        if self._file is None:
            if self._resumed_step is not None:
                drop_after(self._path, self._resumed_step)
            # Not buffered: the system says how much of a line it took.
            self._file = self._path.open("ab", buffering=0)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add a line a record, on disk before this returns. Raises OSError."""
        self._waiting += "".join(json.dumps(record) + "\n" for record in records).encode()
        self.open()
        assert self._file is not None
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what still waits is lost."""
        if self._file is not None:
            self._file.close()


class JsonlSink:
    """Appends one line a record, on disk before ``log`` returns.

    ``open``, ``log`` and ``close`` raise OSError where the file cannot be opened or written. The
    record is not lost then: the next ``log`` tries again, with all that waits (``LineFile``).
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        self._lines = LineFile(path, resumed_step=resumed_step)

    def open(self) -> None:
        """Open the file; ``log`` does it where that failed."""
        self._lines.open()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one record."""
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        record.update((name, _plain(value)) for name, value in metrics.items())
        self._lines.append([record])

    def close(self) -> None:
        """Write what waits and close the file."""
        try:
            self._lines.append([])
        finally:
            self._lines.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl`` by step, lines of one step merged (the later value wins).

    A line cut off by a kill is left out. Example: lines ``{"step": 1, "a": 1}`` and
    ``{"step": 1, "b": 2}`` give ``[{"step": 1, "a": 1, "b": 2}]``.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = _parsed(line)
        if record is not None:
            by_step.setdefault(record["step"], {}).update(record)
    return [by_step[step] for step in sorted(by_step)]


def drop_after(path: Path, step: int) -> None:
    """Rewrite a file of records with those before the checkpoint of ``step``, if there is one; a
    kill here loses nothing."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    records = [(line, _parsed(line)) for line in lines]
    kept = [line for line, record in records if record is not None and _is_before(record, step)]
    is_whole = not text or text.endswith("\n")  # else the next record would join the last line
    if len(kept) == len(lines) and is_whole:
        return
    if len(kept) < len(lines):
        log.info("%s: dropped %d records after step %d", path.name, len(lines) - len(kept), step)
    write_whole(path, "".join(line + "\n" for line in kept))


def _is_before(record: Mapping[str, Any], step: int) -> bool:
    """Whether a record was written before the checkpoint of ``step``."""
    evaluation = any(name.startswith("eval/") for name in record)
    return record["step"] < step or (record["step"] == step and not evaluation)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def _plain(value: float) -> float | int | None:
    """A JSON number (also from numpy and torch scalars); None where there is none."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
