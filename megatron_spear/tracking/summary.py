"""``summary.json``: what a run came to, in one small file and one table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_spear.files import write_whole

REQUIRED = (
    "success_before",
    "success_after",
    "failed_before",
    "failed_after",
    "steps",
    "wall_s",
    "rollout_tokens_per_s",
    "train_tokens_per_s",
    "panel_sha256",
)
"""Keys every summary has."""


def write_summary(path: Path, fields: Mapping[str, Any]) -> None:
    """Write ``fields`` as JSON, whole or not at all; they must include ``REQUIRED``."""
    missing = [key for key in REQUIRED if key not in fields]
    assert not missing, f"summary without {', '.join(missing)}"
    write_whole(path, json.dumps(dict(fields), indent=2) + "\n")


def summary_rows(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as (name, value) rows to show, nested maps one row an entry.

    Example: ``summary_rows({"success_before": 0.25, "wall_s": 75.0})`` is
    ``[("success before", "0.250"), ("wall", "1 min 15 s")]``.
    """
    rows: list[tuple[str, str]] = []
    for key, value in fields.items():
        if isinstance(value, Mapping):
            rows.extend((f"{_words(key)}: {name}", _shown(key, v)) for name, v in value.items())
        else:
            rows.append((_words(key), _shown(key, value)))
    return rows


def _words(key: str) -> str:
    if key.endswith("_per_s"):
        return key.removesuffix("_per_s").replace("_", " ") + " per second"
    return key.removesuffix("_s").replace("_", " ")


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, (list, tuple)):
        return " to ".join(_shown(key, item) for item in value)
    if key.endswith("_sha256"):
        return f"{value}"[:16]
    if key.endswith("_per_s"):
        return f"{value:,.0f}"
    if key.endswith("_s"):
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds} s" if minutes else f"{value:.1f} s"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
