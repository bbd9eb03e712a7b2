"""The user's own hooks, from ``hooks:`` in the settings to objects; every mistake told at once.

Made on rank 0 at the start of a run, before any model is; ``check-config`` makes them too.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from megatron_spear.config.base import Section
from megatron_spear.config.complaints import validated
from megatron_spear.config.hooks import HookSection
from megatron_spear.config.sources import Settings
from megatron_spear.errors import ConfigError, describe
from megatron_spear.trainer.hooks.base import Hook

_HOOK = f"{Hook.__module__}.{Hook.__name__}"


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
    kind = _hook_class(_module(entry, key), entry, key)
    arguments = _arguments(kind, entry.settings, f"{key}.settings")
    try:
        return kind(*arguments)
    except Exception as error:
        made = f"{kind.__name__}({'settings' if arguments else ''})"
        raise _problem(entry, key, f"{made} raised {_line(error)}; repair the class") from error


def _module(entry: HookSection, key: str) -> ModuleType:
    """The module of a dotted name, or of a file; imported once."""
    find = _from_file if entry.module.endswith(".py") else _imported
    try:
        return find(entry, key)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        what = f"importing {entry.module} raised {_line(error)}; repair it"
        raise _problem(entry, key, what) from error


def _imported(entry: HookSection, key: str) -> ModuleType:
    try:
        return importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{entry.module}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        raise _problem(
            entry,
            key,
            f"there is no module {error.name!r} on Python's path; put the folder that holds it on "
            f"PYTHONPATH, install it, or name the file, FILE.py:{entry.class_name}",
        ) from error


def _from_file(entry: HookSection, key: str) -> ModuleType:
    path = Path(entry.module).expanduser().resolve()
    if not path.is_file():
        where = f"relative paths start at the current directory, {Path.cwd()}"
        raise _problem(entry, key, f"there is no file {entry.module} ({where})")
    name = f"hooks of {path}"  # no name that an import could mean
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _hook_class(module: ModuleType, entry: HookSection, key: str) -> type[Hook]:
    name = entry.class_name
    found = getattr(module, name, None)
    if _is_hook_class(found):
        return found
    if hasattr(module, name):
        what = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
        raise _problem(entry, key, f"{name} is {what}, expected a subclass of {_HOOK}")
    known = [n for n, v in vars(module).items() if _is_hook_class(v) and v is not Hook]
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"its hooks are: {', '.join(known) or 'none'}"
    raise _problem(entry, key, f"{entry.module} has no {name}; {hint}")


def _is_hook_class(found: Any) -> TypeGuard[type[Hook]]:
    return isinstance(found, type) and issubclass(found, Hook)


def _arguments(kind: type[Hook], given: dict[str, Any], key: str) -> tuple[Section, ...]:
    """What the class is made with: its settings, checked, or nothing where it has none."""
    if kind.Settings is Hook.Settings:
        if given:
            raise ConfigError(
                f"{key}: got {', '.join(given)}, but {kind.__name__} has no settings; take them "
                "out, or give the class its own Settings(Hook.Settings)"
            )
        return ()
    if not (isinstance(kind.Settings, type) and issubclass(kind.Settings, Section)):
        raise ConfigError(
            f"{key}: {kind.__name__}.Settings is no subclass of Hook.Settings; derive it from that"
        )
    try:
        settings, lines = validated(kind.Settings, given, Settings(tree=given))
    except Exception as error:
        raise ConfigError(f"{key}: checking them raised {_line(error)}; repair it") from error
    if lines or settings is None:
        raise ConfigError("\n".join(_below(key, lines)))
    return (settings,)


def _below(key: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines about a hook's settings, with the path to them in front."""
    for line in lines:
        yield key + line if line.startswith(":") else f"{key}.{line}"


def _problem(entry: HookSection, key: str, what: str) -> ConfigError:
    return ConfigError(f"{key}.path: {entry.path}: {what}")


def _line(error: BaseException) -> str:
    """The error in one line; a syntax error says its place itself."""
    text = f"SyntaxError: {error}" if isinstance(error, SyntaxError) else describe(error)
    return " ".join(text.split())
