"""Finds what a user's setting names: ``package.module:name``, or ``FILE.py:name``.

Hooks and environments are loaded with it, also in environment workers: so no pydantic here.
Every message begins with ``place``, which says where the name was written.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_spear.errors import ConfigError, describe

_FILE = "file "
"""How the name of a module made from a file begins, so that no import could mean it."""
_NAME = re.compile(r"[^:]+:[A-Za-z_]\w*")


def is_code_path(text: str) -> bool:
    """Whether a text has the form ``package.module:name`` or ``FILE.py:name``."""
    return _NAME.fullmatch(text) is not None


def load_module(name: str, place: str, attribute: str) -> ModuleType:
    """The module of a dotted name, or of a file that ends in ``.py``; imported once.

    ``attribute`` is what is wanted of it, for the message. Raises ConfigError, also for whatever
    the import raises.
    """
    try:
        return (
            _from_file(name, place) if name.endswith(".py") else _imported(name, place, attribute)
        )
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        what = f"importing {name} raised {one_line(error)}; repair it"
        raise ConfigError(f"{place}: {what}") from error


def load_class(path: str, place: str, base: type, plural: str) -> Any:
    """The subclass of ``base`` that ``path`` names.

    ``plural`` is what such classes are called where the module has others. Raises ConfigError.

    Example: ``load_class("my.module:MyHook", "hooks[0].path: my.module:MyHook", Hook, "hooks")``.
    """
    module_name, _, name = path.partition(":")
    module = load_module(module_name, place, name)

    def fits(found: Any) -> bool:
        return isinstance(found, type) and issubclass(found, base)

    found = getattr(module, name, None)
    if fits(found):
        return found
    if hasattr(module, name):
        what = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
        expected = f"{base.__module__}.{base.__name__}"
        raise ConfigError(f"{place}: {name} is {what}, expected a subclass of {expected}")
    known = [n for n, v in vars(module).items() if fits(v) and v is not base]
    near = get_close_matches(name, known, n=1)
    others = f"its {plural} are: {', '.join(known) or 'none'}"
    hint = f"did you mean {near[0]}?" if near else others
    raise ConfigError(f"{place}: {module_name} has no {name}; {hint}")


def load_callable(path: str, place: str) -> Callable[..., Any]:
    """The function or class that ``path`` names. Raises ConfigError."""
    module_name, _, name = path.partition(":")
    if not is_code_path(path):
        raise ConfigError(f"{place}: expected 'package.module:callable' or 'FILE.py:callable'")
    found = getattr(load_module(module_name, place, name), name, None)
    if not callable(found):
        got = "is not there" if found is None else f"is a {type(found).__name__}"
        raise ConfigError(f"{place}: {name} {got}, expected something to call, a class say")
    made: Callable[..., Any] = found
    return made


def code_path(found: type) -> str:
    """What names a class of a module's top level in another process; the inverse of loading it.

    Example: ``Guess`` of the file ``/home/me/guess.py`` gives ``/home/me/guess.py:Guess``. Raises
    ConfigError for a class inside a function or a class, which has no such name.
    """
    module, name = found.__module__, found.__qualname__
    if "." in name or module == "__main__":
        raise ConfigError(
            f"{name} cannot be found from another process; define it at the top level of a file "
            "that is named in the settings, or of a module that can be imported"
        )
    return f"{module.removeprefix(_FILE)}:{name}"


def source_sha256(kind: type) -> str:
    """sha256 of the file that a class is written in; "" where there is none."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def one_line(error: BaseException) -> str:
    """The error in one line; a syntax error says its place itself."""
    text = f"SyntaxError: {error}" if isinstance(error, SyntaxError) else describe(error)
    return " ".join(text.split())


def _imported(name: str, place: str, attribute: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        raise ConfigError(
            f"{place}: there is no module {error.name!r} on Python's path; put the folder that "
            f"holds it on PYTHONPATH, install it, or name the file, FILE.py:{attribute}"
        ) from error


def _from_file(text: str, place: str) -> ModuleType:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        where = f"relative paths start at the current directory, {Path.cwd()}"
        raise ConfigError(f"{place}: there is no file {text} ({where})")
    name = f"{_FILE}{path}"
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
