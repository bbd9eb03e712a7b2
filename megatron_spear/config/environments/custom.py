"""Settings of an environment of the user's own."""

from typing import Any, Literal

from pydantic import Field

from megatron_spear.config.base import CodePath
from megatron_spear.config.environments.base import EnvironmentSection


class CustomSection(EnvironmentSection):
    """A family of tasks from a file or a module of the user's own (docs/environments.md).

    Example: ``{type: custom, family: "number_game.py:NumberGame", settings: {highest: 20}}``.
    """

    type: Literal["custom"] = "custom"
    """Which environment."""
    family: CodePath
    """The ``EnvironmentFamily``: ``FILE.py:Class`` (a relative file starts at the current
    directory), or ``package.module:Class`` as Python imports it."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The family's own settings, checked by the ``Settings`` of its class."""

    @property
    def task_kinds(self) -> None:
        """The class knows."""
        return None
