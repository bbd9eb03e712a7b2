"""Reading recorded vector files, and what counts as a match with a recorded number.

A match is ``|got - recorded| <= tolerance * (1 + |recorded|)`` with the tolerance 1e-9 for a case
recorded in float64 and 2e-4 in float32; "nan", "inf" and "-inf" match only themselves.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.errors import DataError

Case = dict[str, Any]
# What a check takes and yields: one line for each thing of the case that differed.
Check = Callable[[Case], Iterator[str]]

TOLERANCE = {"float64": 1e-9, "float32": 2e-4}
CASE_FIELDS = ("name", "inputs", "params", "expected")


def read_cases(path: Path) -> list[Case]:
    """The cases ``{name, inputs, params, expected}`` of one vector file; raises `DataError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a JSON vector file.") from None
    cases = found.get("cases") if isinstance(found, dict) else None
    if not isinstance(cases, list):
        raise DataError(f"{path}: expected a JSON object with a list named cases.")
    for number, case in enumerate(cases):
        if not isinstance(case, dict) or not all(field in case for field in CASE_FIELDS):
            raise DataError(f"{path}, case {number}: expected the fields {', '.join(CASE_FIELDS)}.")
    return cases


def number_differences(
    name: str, got: Any, recorded: Any, dtype: str, *, tolerance: Any = None
) -> Iterator[str]:
    """At most one line: the shapes, or the first number that differs and how many do.

    ``tolerance`` (a number or an array that broadcasts) replaces that of ``dtype``. No rows match
    no rows: JSON does not say how wide they are.
    """
    found, expected = np.asarray(got, np.float64), np.asarray(recorded, np.float64)
    if found.shape[:1] == expected.shape[:1] == (0,):
        return
    if found.shape != expected.shape:
        yield f"{name}: got shape {found.shape}, recorded {expected.shape}"
        return
    allowed = np.asarray(TOLERANCE[dtype] if tolerance is None else tolerance)
    with np.errstate(invalid="ignore"):  # inf - inf
        near = np.abs(found - expected) <= allowed * (1 + np.abs(expected))
    # an infinite allowance would let every number match a recorded infinity
    near &= np.isfinite(expected)
    same = near | (found == expected) | (np.isnan(found) & np.isnan(expected))
    wrong = np.argwhere(~same)
    if len(wrong):
        first = tuple(wrong[0].tolist())
        where = f"{name}{list(first)}" if first else name
        more = f" ({len(wrong)} of {same.size} differ)" if same.size > 1 else ""
        yield f"{where}: got {float(found[first])!r}, recorded {float(expected[first])!r}{more}"


def value_differences(name: str, got: Any, recorded: Any) -> Iterator[str]:
    """At most one line, for what has to be equal: labels, row numbers, flags, texts."""
    if got != recorded:
        yield f"{name}: got {got!r}, recorded {recorded!r}"


def named_differences(got: dict[str, Any], recorded: dict[str, Any], dtype: str) -> Iterator[str]:
    """One line for each entry of numbers that differs, or for other names than the recorded."""
    yield from value_differences("names", sorted(got), sorted(recorded))
    for name in (name for name in got if name in recorded):
        yield from number_differences(name, got[name], recorded[name], dtype)
