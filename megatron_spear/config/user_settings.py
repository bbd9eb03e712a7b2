"""The settings of a class of the user's own, checked by the class itself."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_spear.config.base import Section
from megatron_spear.config.complaints import validated
from megatron_spear.config.sources import Settings
from megatron_spear.errors import ConfigError
from megatron_spear.user_code import one_line


def checked_settings(
    kind: Any, base: Any, given: Mapping[str, Any], key: str
) -> tuple[Section, ...]:
    """What ``kind`` is made with: its settings, or nothing where it has none of its own.

    ``kind`` is a subclass of ``base``, and both have ``Settings``; ``key`` is where ``given`` was
    written. Raises ConfigError with a line for each mistake.
    """
    if kind.Settings is base.Settings:
        if given:
            raise ConfigError(
                f"{key}: got {', '.join(map(str, given))}, but {kind.__name__} has no settings; "
                f"take them out, or give the class its own Settings({base.__name__}.Settings)"
            )
        return ()
    if not (isinstance(kind.Settings, type) and issubclass(kind.Settings, Section)):
        raise ConfigError(
            f"{key}: {kind.__name__}.Settings is no subclass of {base.__name__}.Settings; derive "
            "it from that"
        )
    try:
        settings, lines = validated(kind.Settings, given, Settings(tree=dict(given)))
    except Exception as error:
        raise ConfigError(f"{key}: checking them raised {one_line(error)}; repair it") from error
    if lines or settings is None:
        raise ConfigError("\n".join(_below(key, lines)))
    return (settings,)


def _below(key: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines about the settings, with the path to them in front."""
    for line in lines:
        yield key + line if line.startswith(":") else f"{key}.{line}"
