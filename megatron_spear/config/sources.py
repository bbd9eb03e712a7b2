"""Settings as they were written: a YAML file and ``a.b=c`` overrides, each value with its origin.

Nothing is checked against the schema here beyond texts: ``run.name=007`` stays the text ``007``.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_spear.config.knobs import Knob, known_paths


@dataclass(slots=True)
class Settings:
    """A tree of values, where each came from, and what could not be read.

    ``tree`` is nested maps; ``origins`` maps a dotted path to words such as ``a.yaml line 12`` or
    ``override 'run.steps=3'``; ``problems`` are complete lines for the user.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, path: str, value: Any, origin: str) -> None:
        """Set one dotted path; maps are merged, anything else is replaced."""
        self.origins[path] = origin
        self.origins.update({f"{path}.{inner}": origin for inner in _paths_of(value)})
        for part in reversed(path.split(".")):
            value = {part: value}
        self.tree = merged(self.tree, value)

    def origin(self, path: str) -> str:
        """Where a path, something inside it or the nearest map above it was written; else empty."""
        inside = (key for key in self.origins if key.startswith(path + "."))
        if path not in self.origins and (first := next(inside, None)):
            return self.origins[first]
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path.rpartition(".")[0]
        return ""


def merged(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``new`` on top; a map of another ``type`` replaces the old one.

    Example: ``merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})`` is ``{"a": {"x": 1, "y": 3}}``.
    """
    result = dict(base)
    for key, value in new.items():
        old = result.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("type", old.get("type")) == old.get("type")
        ):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in a tree that is no map.

    Example: ``{"a": {"x": 1}, "b": [2]}`` gives ``("a.x", 1)`` and ``("b", [2])``.
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml(path: Path, settings: Settings) -> None:
    """Add a YAML file; a missing file, a syntax error, a key given twice become problem lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        settings.problems.append(
            f"{path}: cannot be read ({reason}); expected a YAML file "
            f"(relative paths start at the current directory, {Path.cwd()})"
        )
        return
    try:
        node, value = _parsed(text)
    except yaml.YAMLError as error:
        settings.problems.append(f"{path}{_where(error)}: not YAML: {_reason(error)}")
        return
    if value is None:
        return
    if not isinstance(value, dict):
        settings.problems.append(
            f"{path}: got {type(value).__name__} at the top, expected a map of sections "
            "such as 'run:' and 'rollout:'"
        )
        return
    lines: dict[str, int] = {}
    for key, line in _keys(node, ""):
        if key in lines:
            settings.problems.append(
                f"{key}: given twice ({path.name} lines {lines[key]} and {line})"
            )
        lines[key] = line
    settings.tree = merged(settings.tree, _text_keys(value))
    settings.origins.update({key: f"{path.name} line {line}" for key, line in lines.items()})


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> tuple[yaml.Node | None, Any]:
    """Nodes and value, which nobody changes: a table of runs reads its files again and again."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def read_overrides(overrides: Sequence[str], settings: Settings) -> None:
    """Add ``a.b=c``, ``--a.b=c`` and ``--a.b c`` in order; the last wins, also over the file."""
    waiting = ""
    for token in overrides:
        if waiting and not token.startswith("--"):
            _put_override(settings, waiting[2:], token, f"override '{waiting} {token}'")
            waiting = ""
            continue
        _no_value(waiting, settings)
        waiting = ""
        key, equals, text = token.removeprefix("--").partition("=")
        if equals:
            _put_override(settings, key.strip(), text, f"override {token!r}")
        elif token.startswith("--"):
            waiting = token
        else:
            settings.problems.append(f"override {token!r}: expected key=value or --key value")
    _no_value(waiting, settings)


def _no_value(token: str, settings: Settings) -> None:
    if token:
        settings.problems.append(f"override {token!r}: has no value; write {token}=VALUE")


def _put_override(settings: Settings, key: str, text: str, origin: str) -> None:
    if not key or not all(key.split(".")):
        settings.problems.append(f"{origin}: got the key {key!r}, expected a.b=value")
        return
    knob = known_paths().get(key)
    if not text.strip() and (knob is None or str not in knob.types):
        settings.problems.append(f"{key}: no value ({origin}); write null for none")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        settings.problems.append(f"{key}: got {text!r}, not YAML: {_reason(error)} ({origin})")
        return
    if knob is not None and _is_literal(knob, text, value):
        value = text
    settings.put(key, value, origin)


def _is_literal(knob: Knob, text: str, value: Any) -> bool:
    """Whether the text itself is the value: for texts and paths, but for a null that they take."""
    if value is not None:
        return str in knob.types or Path in knob.types
    return str in knob.types and not (text.strip() and type(None) in knob.types)


def _paths_of(value: Any) -> Iterator[str]:
    """Dotted paths of all keys inside a map; nothing for any other value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from (f"{key}.{path}" for path in _paths_of(inner))


def _text_keys(value: Any) -> Any:
    """The same maps with every key a text, so that ``1:`` is told as an unknown key like others."""
    if isinstance(value, dict):
        return {str(key): _text_keys(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_text_keys(inner) for inner in value]
    return value


def _keys(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    """Every key of a YAML map as a dotted path with its line, counted from 1.

    Maps inside lists too: ``hooks[0].name``.
    """
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _keys(item, f"{prefix.removesuffix('.')}[{index}].")
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        yield path, key.start_mark.line + 1
        yield from _keys(value, path + ".")


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""


def _reason(error: yaml.YAMLError) -> str:
    parts = (getattr(error, "context", None), getattr(error, "problem", None))
    return ", ".join(part for part in parts if part) or " ".join(str(error).split())
