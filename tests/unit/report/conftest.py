"""Reads a report as a browser would, without one."""

import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class ReadReport:
    """The blocks of data in a report."""

    def __init__(self, path: Path) -> None:
        self.html = path.read_text(encoding="utf-8")
        found = re.findall(
            r'<script type="application/gzip" id="([^"]+)">([^<]*)</script>', self.html
        )
        self.blocks = {name: gzip.decompress(base64.b64decode(text)) for name, text in found}
        self.data: dict[str, Any] = json.loads(self.blocks["data"])
        self.listing: dict[str, Any] = json.loads(self.blocks["listing"])

    def body(self, place: int) -> dict[str, Any]:
        """The body of the listed trajectory of that place."""
        columns = self.listing["trajectories"]
        lines = self.blocks[f"chunk-{columns['chunk'][place]}"].decode().split("\n")
        found: dict[str, Any] = json.loads(lines[columns["line"][place]])
        return found


@pytest.fixture(scope="session")
def read_report() -> Callable[[Path], ReadReport]:
    """Reads a written report."""
    return ReadReport
