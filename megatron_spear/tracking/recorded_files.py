"""Writes and reads the files of recorded trajectories.

from pathlib import Path
from megatron_spear.tracking.recorded_files import list_steps, read_step

folder = Path("runs/seed1/trajectories")
for step in list_steps(folder):
    for trajectory in read_step(folder, step).trajectories:
        print(step, trajectory.id, trajectory.won, len(trajectory.turns))
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from megatron_spear.errors import DataError
from megatron_spear.files import replacing
from megatron_spear.tracking.recorded import (
    FORMAT,
    RecordedReplay,
    RecordedReward,
    RecordedStep,
    RecordedTrajectory,
    RecordedTurn,
)
from megatron_spear.types import ToolCall, VersionSpan

FOLDER = "trajectories"
"""Its name in a run directory."""

_NAME = re.compile(r"step-(\d{8,})\.jsonl\.gz")
_LEVEL = 4  # twice as fast as gzip's own 6, for files some 5 % larger
_LISTS = ("trajectories", "replayed")
# What a cut, foreign or mangled file is read as.
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
)
_Record = TypeVar("_Record")


def step_file(folder: Path, step: int) -> Path:
    """The file of a step, there or not."""
    return folder / f"step-{step:08d}.jsonl.gz"


def list_steps(folder: Path) -> list[int]:
    """The recorded steps, ascending; [] where there is no such folder."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def write_step(folder: Path, recorded: RecordedStep) -> Path:
    """Write a step's file, whole or not at all, in place of an earlier one; the same records give
    the same bytes. No disk is waited for, so a power cut may cost the last ones.

    Raises OSError (a full disk), and ValueError for a number that is not finite.
    """
    head = _fields(recorded)
    lists = {name: head.pop(name) for name in _LISTS}
    lines: list[Any] = [{"format": FORMAT, **head}]
    lines += [{"trajectory": record} for record in lists["trajectories"]]
    lines += [{"replayed": record} for record in lists["replayed"]]
    text = "".join(_encode(line) + "\n" for line in lines)
    folder.mkdir(exist_ok=True)
    path = step_file(folder, recorded.step)
    with replacing(path) as file:
        file.write(gzip.compress(text.encode("ascii"), _LEVEL, mtime=0))
    return path


def read_step(folder: Path, step: int) -> RecordedStep:
    """The records of one step.

    Raises FileNotFoundError for a step that is not recorded, DataError naming the file where it is
    damaged or of another format.
    """
    path = step_file(folder, step)
    try:
        lines = gzip.decompress(path.read_bytes()).splitlines()
        head, *records = [json.loads(line) for line in lines]
        return _step(head, records)
    except _DAMAGE as error:
        raise DataError(
            f"{path}: got {type(error).__name__}: {error}; expected recorded trajectories of "
            f"format {FORMAT}. A damaged file can be deleted: the run goes on without it"
        ) from error


def drop_steps_after(folder: Path, step: int) -> int:
    """Remove the files of later steps than ``step``, and what a kill left half-written; returns how
    many. A resumed run writes them again."""
    doomed = [step_file(folder, found) for found in list_steps(folder) if found > step]
    if folder.is_dir():
        doomed += [path for path in folder.glob("step-*.jsonl.gz.tmp") if path.is_file()]
    for path in doomed:
        path.unlink()
    return len(doomed)


def _fields(record: Any) -> dict[str, Any]:
    """A record's fields by name. A turn leaves out a text that its tokens make up, and an optional
    list is null."""
    plain = {name: getattr(record, name) for name in record.__slots__}
    if isinstance(record, RecordedTurn) and record.text == "".join(record.tokens):
        del plain["text"]
    return plain


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_fields).encode


def _step(head: Mapping[str, Any], records: list[Mapping[str, Any]]) -> RecordedStep:
    values = dict(head)
    found = values.pop("format")
    if found != FORMAT:
        raise ValueError(f"format {found!r}")
    return _made(
        RecordedStep,
        values,
        trajectories=tuple(_trajectory(r["trajectory"]) for r in records if "trajectory" in r),
        replayed=tuple(_replay(r["replayed"]) for r in records if "replayed" in r),
    )


def _trajectory(plain: Mapping[str, Any]) -> RecordedTrajectory:
    return _made(
        RecordedTrajectory,
        plain,
        reward=_made(RecordedReward, plain["reward"]) if plain["reward"] else None,
        segment_marks=tuple(map(tuple, plain["segment_marks"])),
        turns=tuple(_turn(turn) for turn in plain["turns"]),
    )


def _turn(plain: Mapping[str, Any]) -> RecordedTurn:
    return _made(
        RecordedTurn,
        plain,
        text=plain["text"] if "text" in plain else "".join(plain["tokens"]),
        tokens=tuple(plain["tokens"]),
        rollout_logprobs=tuple(plain["rollout_logprobs"]),
        old_logprobs=_optional(plain["old_logprobs"]),
        advantages=_optional(plain["advantages"]),
        versions=tuple(VersionSpan(*span) for span in plain["versions"]),
        tool_calls=tuple(ToolCall(**call) for call in plain["tool_calls"]),
    )


def _replay(plain: Mapping[str, Any]) -> RecordedReplay:
    return _made(
        RecordedReplay,
        plain,
        reward=_made(RecordedReward, plain["reward"]),
        segments=tuple(plain["segments"]),
    )


def _optional(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _made(kind: Callable[..., _Record], plain: Mapping[str, Any], **made: Any) -> _Record:
    """A record of plain values, ``made`` ones in their place.

    ValueError names the keys that are missing (those without a default) and those nobody knows.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values = {**plain, **made}
    needed = {
        name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    }
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"a record without {', '.join(missing)}")
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"a record with {', '.join(unknown)}, which a later version may know")
    return kind(**values)
