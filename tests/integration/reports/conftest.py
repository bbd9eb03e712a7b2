"""A browser, and reports to open in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from report_pages import DRAWN, Open

from megatron_spear.report.write import ReportWriter
from megatron_spear.testing.browser import Browser, Page
from megatron_spear.testing.recorded_runs import made_run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a report; at the end its page must have complained of nothing and asked for nothing."""
    pages: list[Page] = []

    def open_(file: Path, fragment: str = "", width: int = 1280) -> Page:
        page = browser.open(file, width=width, height=900, fragment=fragment)
        page.wait(DRAWN)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.value("1 + 1")  # what it said last is heard now
        assert page.errors == []
        assert all(request.startswith("file://") for request in page.requests)
        assert len(set(page.requests)) <= 1, "the file itself"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    run = made_run(folder / "run", steps=12, groups=6, members=4)
    return ReportWriter([run], folder / "one.html").write().path
