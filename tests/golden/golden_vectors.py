"""The recorded numbers of the official code as pytest cases, and what counts as a match."""

from pathlib import Path
from typing import Any

import pytest

from megatron_spear.testing.golden.compare import number_differences, read_cases

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def cases(name: str, **params: str) -> list[Any]:
    """The cases of one file with these ``params``; one skipped case where the folder is absent."""
    path = GOLDEN / f"{name}.json"
    if not path.exists():
        reason = f"{path} is absent (recorded outside results)"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    chosen = [case for case in read_cases(path) if params.items() <= case["params"].items()]
    return [pytest.param(case, id=case["name"]) for case in chosen]


def assert_match(got: Any, expected: Any, dtype: str, *, float64: float | None = None) -> None:
    """``float64`` replaces the tolerance of a case recorded in float64."""
    tolerance = float64 if dtype == "float64" else None
    lines = list(number_differences("value", got, expected, dtype, tolerance=tolerance))
    assert not lines, lines
