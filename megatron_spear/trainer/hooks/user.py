"""The user's own hooks, from ``hooks:`` in the settings to objects; every mistake told at once.

Made on rank 0 at the start of a run, before any model is; ``check-config`` makes them too.
"""

from collections.abc import Sequence

from megatron_spear.config.hooks import HookSection
from megatron_spear.config.user_settings import checked_settings
from megatron_spear.errors import ConfigError
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.user_code import load_class, one_line


def user_hooks(entries: Sequence[HookSection]) -> dict[str, Hook]:
    """The hooks by name, in order; ConfigError with one line for each that cannot be made.

    Example: an entry with name ``a``, path ``my.module:MyHook`` and no settings gives
    ``{"a": MyHook()}``.
    """
    hooks: dict[str, Hook] = {}
    problems: list[str] = []
    for index, entry in enumerate(entries):
        try:
            hooks[entry.name] = _made(entry, f"hooks[{index}]")
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError(
            "these hooks cannot be used (docs/hooks.md):\n" + "\n".join(f"  {p}" for p in problems)
        )
    return hooks


def _made(entry: HookSection, key: str) -> Hook:
    place = f"{key}.path: {entry.path}"
    kind: type[Hook] = load_class(entry.path, place, Hook, "hooks")
    arguments = checked_settings(kind, Hook, entry.settings, f"{key}.settings")
    try:
        return kind(*arguments)
    except Exception as error:
        made = f"{kind.__name__}({'settings' if arguments else ''})"
        raise ConfigError(f"{place}: {made} raised {one_line(error)}; repair the class") from error
