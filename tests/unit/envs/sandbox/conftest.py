"""Sandboxes for the tests, and what is there to be found outside of them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_sandboxes import make_local

from megatron_spear.envs.sandbox.local import LocalSandbox
from megatron_spear.testing.sandboxes import why_no_sandbox


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """Skips where there is none that works."""
    if why := why_no_sandbox():
        pytest.skip(why)


@pytest.fixture(scope="module")
def sandbox(bubblewrap: None) -> Iterator[LocalSandbox]:
    """The default one."""
    made = make_local()
    yield made
    made.close()


@pytest.fixture(scope="module")
def short(bubblewrap: None) -> Iterator[LocalSandbox]:
    """One with little time, for what goes on until it is stopped."""
    made = make_local(timeout_s=1.0, memory_mb=256)
    yield made
    made.close()


@pytest.fixture(scope="module")
def small(bubblewrap: None) -> Iterator[LocalSandbox]:
    """One with little memory."""
    made = make_local(memory_mb=256)
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[LocalSandbox]:
    """One without bubblewrap."""
    made = make_local(jailed=False)
    yield made
    made.close()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of all temporary files, which other users can enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
