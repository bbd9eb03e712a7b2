"""The library behind an adapter: installed or not, and its draws kept apart."""

import contextlib
import importlib
import importlib.util
import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from megatron_spear.errors import ConfigError

_EXTRAS = {
    "gem": "gem",
    "gymnasium": "gymnasium",
    "reasoning_gym": "reasoning-gym",
    "skyrl_gym": "skyrl-gym",
    "verifiers": "verifiers",
}
"""The extra of this package that installs a library, by the name that is imported."""


def require_library(name: str) -> None:
    """Raise ConfigError, which names the extra, unless the library is there; imports nothing."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"env.type={name} needs the library {name}, which is not installed; give "
            f"pip install 'megatron-spear[{_EXTRAS[name]}]'"
        )


def library(name: str) -> ModuleType:
    """The library, imported. Raises ConfigError where it is missing."""
    require_library(name)
    return importlib.import_module(name)


class OwnChance:
    """The state of Python's and numpy's global draws, for one of many environments of a process.

    A library that draws from ``random`` itself gets the same numbers in a block of its own,
    whatever other environments of the worker drew in between.
    """

    def __init__(self) -> None:
        self._states: tuple[Any, Any] = (None, None)

    @contextlib.contextmanager
    def drawn(self, seed: int | None = None) -> Iterator[None]:
        """For the length of the block, the draws go on where this object's last block ended, or
        begin from ``seed``."""
        numpy = sys.modules.get("numpy")
        outside = (random.getstate(), numpy.random.get_state() if numpy else None)
        if seed is not None:
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
        elif self._states[0] is not None:
            random.setstate(self._states[0])
            if numpy and self._states[1] is not None:
                numpy.random.set_state(self._states[1])
        try:
            yield
        finally:
            self._states = (random.getstate(), numpy.random.get_state() if numpy else None)
            random.setstate(outside[0])
            if numpy:
                numpy.random.set_state(outside[1])
