"""YAML files over each other: those that a file names as its ``base``, and a command line's.

A later file comes over an earlier one, key by key. ``base`` stands at the top of a file: a path or
a list of them, read before the file itself. Its paths start at the file's folder, so that a folder
of settings can be moved; all other relative paths start at the current directory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_spear.config.sources import Settings, merged, read_yaml

BASE_KEY = "base"
SUFFIXES = (".yaml", ".yml")


def split_files(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The YAML files among the words of a command line, and the rest, both in order.

    Example: ``["b.yaml", "run.steps=3"]`` gives ``[Path("b.yaml")]`` and ``["run.steps=3"]``. The
    value of ``--env.games games.yaml`` is no such file.
    """
    files: list[Path] = []
    rest: list[str] = []
    for word in words:
        is_value = bool(rest) and rest[-1].startswith("--") and "=" not in rest[-1]
        is_file = "=" not in word or Path(word).is_file()
        if word.endswith(SUFFIXES) and is_file and not is_value:
            files.append(Path(word))
        else:
            rest.append(word)
    return files, rest


def read_layers(path: Path, settings: Settings, above: tuple[Path, ...] = ()) -> None:
    """Add a YAML file over the files of its ``base``, and these over their own.

    ``above`` are the files that led here. What cannot be read, and a circle, become problem lines.
    """
    if path.resolve() in [file.resolve() for file in above]:
        circle = " -> ".join(file.name for file in (*above, path))
        settings.problems.append(f"{path}: {BASE_KEY} goes round in a circle: {circle}")
        return
    own = Settings()
    read_yaml(path, own)
    origin = own.origins.pop(BASE_KEY, "")
    for base in _bases(own.tree.pop(BASE_KEY, None), origin, own.problems):
        read_layers(path.parent / base, settings, (*above, path))
    settings.tree = merged(settings.tree, own.tree)
    settings.origins.update(own.origins)
    settings.problems += own.problems


def _bases(value: Any, origin: str, problems: list[str]) -> list[str]:
    """The paths that ``base`` names; anything else is a problem."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    if all(isinstance(path, str) and path for path in found):
        return found
    problems.append(
        f"{BASE_KEY}: got {value!r}, expected a YAML file or a list of them, their paths from "
        f"this file's folder ({origin})"
    )
    return []
