"""Reading the recorded numbers of the official code, and what counts as a match."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def cases(name: str, **params: str) -> list[Any]:
    """The cases of one file with these ``params``; one skipped case where the folder is absent."""
    path = GOLDEN / f"{name}.json"
    if not path.exists():
        reason = f"{path} is absent (recorded outside results)"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    found = json.loads(path.read_text())["cases"]
    chosen = [case for case in found if params.items() <= case["params"].items()]
    return [pytest.param(case, id=case["name"]) for case in chosen]


def assert_match(got: Any, expected: Any, dtype: str, *, float64: float = 1e-9) -> None:
    tolerance = {"float64": float64, "float32": 2e-4}[dtype]
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(expected, np.float64), tolerance, tolerance
    )
