"""What the tests of the report's page share: opening it, its fields, what it has drawn."""

import json
from collections.abc import Callable

import pytest

from megatron_spear.testing.browser import Page, find_browser

NEEDS_BROWSER = [
    pytest.mark.skipif(find_browser() is None, reason="no Chromium (apt-get install chromium)"),
    pytest.mark.timeout(240),
]

Open = Callable[..., Page]
DRAWN = "performance.getEntriesByName('drawn').length"
ROWS = "document.querySelectorAll('table.list tbody tr').length"


def set_field(selector: str, value: str) -> str:
    """A script that gives a field a value, as its reader would."""
    return (f"(f => {{ f.value = {json.dumps(value)}; f.dispatchEvent(new Event('change')); }})"
            f"(document.querySelector({json.dumps(selector)}))")  # fmt: skip


def search_list(page: Page, text: str) -> None:
    """Look for a text in the list, then in the turns too."""
    page.value(set_field("#search", text))
    page.wait("document.querySelector('#count').textContent.startsWith('0 of')")
    page.click("#search-turns")
    page.wait("document.querySelector('#search-turns').disabled")
