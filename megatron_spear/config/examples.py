"""The example configurations that come with the package.

They are the repository's ``examples/`` folder: a checkout uses it as it is, a built wheel holds it
as ``megatron_spear/examples``. Nothing is run from there; ``copy_examples`` puts the files where
their users can change them, and where the documentation's commands expect them.
"""

import filecmp
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.errors import ConfigError

FOLDER = "examples"
_IGNORED = ("__pycache__",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One configuration: its name (``alfworld/quickstart.yaml``) and the first line of its
    comment."""

    name: str
    summary: str


def shipped_folder() -> Path:
    """Where the examples lie; ConfigError for an installation that has none."""
    package = Path(__file__).parents[1]
    for place in (package / FOLDER, package.parent / FOLDER):
        if (place / "alfworld").is_dir():
            return place
    raise ConfigError(
        f"{package} came without its examples; install the wheel that `python -m build` makes, or "
        "take the files from the repository"
    )


def list_examples() -> list[Example]:
    """All configurations, by name."""
    folder = shipped_folder()
    return [
        Example(name=path.relative_to(folder).as_posix(), summary=_summary(path))
        for path in sorted(folder.rglob("*.yaml"))
    ]


def copy_examples(target: Path) -> int:
    """Copy all examples into ``target``; returns how many files are new.

    A file that is there already with the same content stays. Raises ConfigError, with nothing
    copied, where one has another content.
    """
    source = shipped_folder()
    files = [
        path.relative_to(source)
        for path in sorted(source.rglob("*"))
        if path.is_file() and not set(_IGNORED) & set(path.parts)
    ]
    there = [name for name in files if (target / name).exists()]
    changed = [name for name in there if not _same(source / name, target / name)]
    if changed:
        names = ", ".join(map(str, changed[:5]))
        raise ConfigError(
            f"{target} holds other files than the examples under the names {names}; nothing was "
            "copied: give another folder, or remove these"
        )
    new = [name for name in files if name not in there]
    for name in new:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return len(new)


def hint_for_missing(path: Path) -> str:
    """What to do about a missing file that is one of the examples; empty for any other."""
    try:
        folder = shipped_folder()
    except ConfigError:
        return ""
    inside = path.parts[path.parts.index(FOLDER) + 1 :] if FOLDER in path.parts else path.parts
    if not inside or not folder.joinpath(*inside).is_file():
        return ""
    return (
        "; it is one of the examples: `megatron-spear examples copy` puts them into the folder "
        f"{FOLDER} of the current directory"
    )


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _summary(path: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += line.lstrip("# ").split()
        if words and words[-1].endswith("."):
            break
    first, stop, _ = " ".join(words).partition(". ")
    return first + "." if stop else first
