"""Whether two runs recorded the same trajectories."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_spear.tracking.recorded_files import FOLDER, list_steps, read_step


def check_same_records(one: Path, other: Path, atol: float = 2e-4) -> None:
    """The same steps, and in each the same records but for times; numbers to within ``atol``."""
    steps = list_steps(one / FOLDER)
    assert steps and list_steps(other / FOLDER) == steps
    for step in steps:
        expected, found = (asdict(read_step(run / FOLDER, step)) for run in (one, other))
        assert found["trajectories"], f"step {step} has none"
        _check(expected, found, f"step {step}", atol)


def _check(expected: Any, found: Any, where: str, atol: float) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {"time_s"}:
            _check(expected[key], found[key], f"{where}: {key}", atol)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(expected, found, strict=True)):
            _check(*pair, f"{where}[{index}]", atol)
    elif isinstance(expected, float) and isinstance(found, float):
        assert abs(found - expected) <= atol, f"{where}: {found}, expected {expected}"
    else:
        assert found == expected, where
