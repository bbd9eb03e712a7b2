"""Each difference that docs/official-mode.md lists has a test of that number."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT = {25}
"""The released replay runs on another actor: what differs is this package."""


def test_every_listed_difference_is_tested() -> None:
    page = (ROOT / "docs" / "official-mode.md").read_text()
    listed = {int(n) for row in re.findall(r"^\| ([\d, ]+) \|", page, re.M) for n in row.split(",")}
    assert listed == set(range(1, 31))
    named = re.compile(r"^def test_defects?_((?:\d\d_(?:and_)?)+)", re.M)
    tested = {
        int(number)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in named.findall(path.read_text())
        for number in re.findall(r"\d\d", name)
    }
    assert listed - tested == WITHOUT
