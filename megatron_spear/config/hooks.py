"""The user's own hooks as settings: which class, under which name, with which settings."""

import re
from typing import Any

from pydantic import Field, field_validator

from megatron_spear.config.base import CodePath, Section

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class HookSection(Section):
    """One hook of the user's own (docs/hooks.md).

    Example: ``{name: rare_types, path: "hooks/rare_types.py:RareTypes", settings: {bonus: 0.2}}``.
    """

    name: str
    """Names the hook in messages and its state in checkpoints; each entry has another one."""
    path: CodePath
    """``package.module:Class`` as Python imports it, or ``FILE.py:Class``; a relative file starts
    at the current directory."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The hook's own settings, checked by the ``Settings`` of its class."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(f"got {value!r}, expected small letters, digits and _, a letter first")
        return value

    @property
    def module(self) -> str:
        """What is imported: a dotted name, or a file that ends in ``.py``."""
        return self.path.partition(":")[0]

    @property
    def class_name(self) -> str:
        """The class inside it."""
        return self.path.partition(":")[2]
