"""Writes docs/configuration.md from the schema: every setting with its values, default and meaning.

python tools/config_reference.py            # writes the page; a test says when it is out of date
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_spear.config.knobs import ITEM, known_paths, members, section_of_list
from megatron_spear.config.schema import RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

_INTRO = """# Settings

<!-- Written by `python tools/config_reference.py` from megatron_spear/config; do not edit. -->

Every setting there is, in the order of `megatron-spear check-config FILE`, which prints the values
of a run. A setting is written in a YAML file, as maps in maps, or behind a command: `run.steps=3`,
`--run.steps=3` or `--run.steps 3`. Values are YAML: `null`, `true`, `[a, b]`, `{window: 2}`. Later
ones win: defaults, [preset](presets.md), file, command line. All mistakes are told at once, and a
name that is not on this page is one of them.

A setting that is a section of one of several **types** takes the settings of that type alone.
"""


_YAML = {"None": "null", "True": "true", "False": "false"}


@dataclass(frozen=True, slots=True)
class _Section:
    """One table: its ``path`` and heading, and what its place in the schema says of its ``use``."""

    path: str
    title: str
    use: str
    model: type[BaseModel]
    defaults: BaseModel | None
    kind: str = ""
    """Value of ``type`` where the section is one of several."""


def text() -> str:
    """The whole page."""
    config = RunConfig()
    top = _Section("", "At the top", "Single settings, and the sections.", RunConfig, config)
    sections = list(_sections(RunConfig, config, ""))
    shared = Counter((section.model, section.path) for section in sections)
    models = Counter(model for model, _ in shared)
    links: dict[str, str] = {}
    for section in sections:
        if "." not in section.path:
            name = section.path.removesuffix(ITEM)
            links.setdefault(name, f"[`{name}`](#{_slug(section.title)})")
    parts, anchors = [_INTRO, "Sections: " + ", ".join(links.values()) + "."], set[str]()
    written = set[tuple[str, str]]()
    for section in (top, *sections):
        if (section.path, section.title) in written:
            continue  # the history of an environment is that of all
        written.add((section.path, section.title))
        parts += _written(section, models[section.model] > 1, anchors)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _sections(
    model: type[BaseModel], defaults: BaseModel | None, prefix: str
) -> Iterator[_Section]:
    """The sections below ``model`` in schema order, each before what is inside it."""
    for name, info in model.model_fields.items():
        value = _default(info, defaults, name)
        path = prefix + name
        for kind in _models(info.annotation):
            own = value if isinstance(value, kind) else None
            of_type = _type_names(kind)
            title = f"{path}: {' or '.join(of_type)}" if of_type else path
            use = _plain(info.description or "")
            yield _Section(path, title, use, kind, own, of_type[0] if of_type else "")
            yield from _sections(kind, own, path + ".")
        entry = section_of_list(info.annotation)
        if entry is not None:
            yield _Section(path + ITEM, f"{path}, each entry", "", entry, None)
            yield from _sections(entry, None, path + ITEM + ".")


def _written(section: _Section, shared: bool, anchors: set[str]) -> list[str]:
    """Heading, text and table; ``shared``: other places have a section of the same class."""
    said = _plain(section.model.__doc__ or "")
    said = f"{section.use} {said}" if shared or section.model is RunConfig else said
    rows = ["| setting | values | default | what |", "|---|---|---|---|"]
    knobs = known_paths(section.model)
    for name, info in section.model.model_fields.items():
        path = f"{section.path}.{name}".lstrip(".")
        anchor = path if path not in anchors else f"{path}-{section.kind}"
        mark = f'<a id="{anchor}"></a>' if not _models(info.annotation) else ""
        if mark:
            assert anchor not in anchors, f"{anchor} would be on the page twice"
            anchors.add(anchor)
        cells = (
            f"{mark}`{path}`",
            _values(path, info, knobs[name].expected),
            _shown(_default(info, section.defaults, name)),
            _plain(info.description or ""),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    level = 2 if "." not in section.path else 3
    return ["#" * level + " " + section.title, said, "\n".join(rows)]


def _values(path: str, info: FieldInfo, expected: str) -> str:
    """What a setting takes; a section is a link to its own table, or one for each of its types."""
    kinds = _models(info.annotation)
    if not kinds:
        words = re.sub(r"'([^']*)'", r"`\1`", expected.removeprefix("one of "))
        return words.replace(">=", "≥").replace("<=", "≤").replace("or null", "or `null`")
    titles = [f"{path}: {' or '.join(t)}" if (t := _type_names(k)) else path for k in kinds]
    linked = [f"[{title}](#{_slug(title)})" for title in titles]
    plain = [m for m in members(info.annotation) if m is type(None) or m not in kinds]
    values = [["null"] if m is type(None) else get_args(m) for m in plain]
    return ", or ".join([*linked, *(f"`{value}`" for group in values for value in group)])


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections among the alternatives of an annotation."""
    found = [m for m in members(annotation) if isinstance(m, type)]
    return [m for m in found if issubclass(m, BaseModel)]


def _type_names(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of ``type`` that choose this section; none for a section without one."""
    info = model.model_fields.get("type")
    return get_args(info.annotation) if info is not None else ()


def _default(info: FieldInfo, defaults: BaseModel | None, name: str) -> Any:
    if defaults is not None:
        return getattr(defaults, name)
    return info.get_default(call_default_factory=True)


def _shown(value: Any) -> str:
    """A default as YAML has it; sections have theirs in their own tables."""
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        kind = getattr(value, "type", "")
        return f"`{kind}`" if kind else ""
    if isinstance(value, dict):
        return "`{}`" if not value else f"`{value}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    if value == "":
        return '`""`'
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _plain(docstring: str) -> str:
    """A docstring as one line of Markdown; names of pages become links."""
    line = " ".join(docstring.split()).replace("``", "`")
    line = re.sub(r"\b(None|True|False)\b", lambda word: f"`{_YAML[word[0]]}`", line)
    line = re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", line)
    outside = line.split("`")
    outside[::2] = [re.sub(r"<(?=\w)", "&lt;", part) for part in outside[::2]]
    return "`".join(outside)


def _slug(title: str) -> str:
    """The anchor of a heading, by the rule that GitHub and MkDocs share for such titles."""
    return re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
    print(f"{PAGE}: {len(PAGE.read_text(encoding='utf-8').split())} words")
