"""What several folders of tests share."""

import importlib
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import yaml

# How long an example takes says something of the machine's load alone.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

EXPERIMENTS = Path(__file__).parents[1] / "tools" / "experiments"
HOOKS_PAGE = Path(__file__).parents[1] / "docs" / "hooks.md"


@pytest.fixture(scope="module")
def experiment_modules() -> Iterator[dict[str, ModuleType]]:
    """The modules of tools/experiments by name, as the script among them sees the others."""
    names = [path.stem for path in sorted(EXPERIMENTS.glob("*.py"))]
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(EXPERIMENTS))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def unchanged_signals() -> Iterator[None]:
    """A test that runs the command within its own process leaves no ignored signal behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@dataclass(frozen=True)
class DocumentedHook:
    """The example of docs/hooks.md: its files in ``folder``, and its entry in the settings."""

    page: str
    folder: Path
    entries: list[dict[str, Any]]


@pytest.fixture
def documented_hook(tmp_path: Path) -> DocumentedHook:
    """``rare_types.py`` and its test, ``page_test.py``, as they are on the page."""
    page = HOOKS_PAGE.read_text(encoding="utf-8")
    hook, test = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (settings,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    folder = tmp_path / "documented"
    folder.mkdir()
    (folder / "rare_types.py").write_text(hook)
    (folder / "page_test.py").write_text(test)
    return DocumentedHook(page, folder, yaml.safe_load(settings)["hooks"])
