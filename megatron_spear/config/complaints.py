"""What is wrong with a set of settings: one line a mistake, with what to write instead."""

import math
import re
from collections.abc import Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_spear.config.knobs import ITEM, LIST_OF, Knob, known_paths
from megatron_spear.config.sources import Settings, leaves

_VALUE_ERROR = "Value error, "
Model = TypeVar("Model", bound=BaseModel)


def validated(
    model: type[Model], tree: Mapping[str, Any], settings: Settings
) -> tuple[Model | None, list[str]]:
    """(The model made of ``tree``, or None; one line for each mistake).

    ``settings`` are those of the tree that were written down, with the lines known already.
    """
    knobs = known_paths(model)
    lines = [*settings.problems, *wrong_kinds(settings, knobs)]
    told = {line.partition(":")[0] for line in lines}
    try:
        return model.model_validate(tree), lines
    except ValidationError as error:
        found = complaints(error.errors(include_url=False), settings, knobs)
    return None, [*lines, *(line for line in found if line.partition(":")[0] not in told)]


def complaints(
    errors: list[ErrorDetails], settings: Settings, knobs: Mapping[str, Knob]
) -> list[str]:
    """One line for each mistake pydantic found, alternatives of a union told once.

    Example: ``rollout.group_sise: no such key; did you mean rollout.group_size? (a.yaml line 3)``.
    """
    located = [(_path(error, knobs), error) for error in errors]
    paths = {path for path, _ in located}
    lines: dict[str, str] = {}
    for path, error in located:
        inner = any(other.startswith(path + ".") for other in paths)
        if inner and isinstance(_value_at(settings.tree, path), Mapping) and path in knobs:
            continue  # the map was meant; its own mistakes are told
        lines.setdefault(path, _line(path, error, knobs, settings))
    return list(lines.values())


def wrong_kinds(settings: Settings, knobs: Mapping[str, Knob]) -> list[str]:
    """Values pydantic would bend in silence: true for a number (it reads 1), not-a-number."""
    lines = []
    for path, value in leaves(settings.tree):
        knob = knobs.get(path)
        if knob is None or not knob.types:
            continue
        bent = isinstance(value, bool) and bool not in knob.types
        if bent or (isinstance(value, float) and math.isnan(value)):
            lines.append(_got(path, value, knob.expected, settings))
    return lines


def suggestion(path: str, knobs: Mapping[str, Knob]) -> str:
    """The known path a misspelt or misplaced one most likely means; empty when nothing is near."""
    parent, dot, name = path.rpartition(".")
    siblings = get_close_matches(name, _keys_of(parent, knobs), n=1, cutoff=0.7)
    likely = [f"{parent}{dot}{near}" for near in siblings]
    namesakes = [knob.path for knob in knobs.values() if knob.name == name]
    likely += sorted(namesakes, key=lambda p: -SequenceMatcher(a=p, b=path).ratio())[:2]
    if likely:
        return " or ".join(likely)
    near = get_close_matches(path, [p for p in knobs if ITEM not in p], n=1, cutoff=0.75)
    if near:
        return near[0]
    names = get_close_matches(name, {knob.name for knob in knobs.values()}, n=1, cutoff=0.8)
    return next((knob.path for knob in knobs.values() if names and knob.name == names[0]), "")


def _line(path: str, error: ErrorDetails, knobs: Mapping[str, Knob], settings: Settings) -> str:
    if error["type"] == "union_tag_invalid":
        path = f"{path}.type"
        return _got(path, error["ctx"]["tag"], knobs[path].expected, settings)
    if error["type"] == "extra_forbidden" and path in knobs:
        parent = path.rpartition(".")[0]
        kind = error["loc"][-2]
        return f"{path}: {parent}.type={kind} has no such key{_from(path, settings)}"
    if error["type"] == "extra_forbidden":
        near = suggestion(path, knobs)
        known = ", ".join(_keys_of(path.rpartition(".")[0], knobs))
        hint = f"did you mean {near}?" if near else f"expected one of {known}"
        return f"{path}: no such key; {hint}{_from(path, settings)}"
    if error["type"] == "value_error":
        return f"{path}: {error['msg'].removeprefix(_VALUE_ERROR)}{_from(path, settings)}"
    knob = knobs.get(_schema_path(path))
    if knob is None and path.endswith("]"):
        expected = knobs[path.partition("[")[0]].expected.removeprefix(LIST_OF)
    else:
        expected = knob.expected if knob else error["msg"]
    if error["type"] == "missing":
        return f"{path}: missing, expected {expected}{_from(path, settings)}"
    return _got(path, error["input"], expected, settings)


def _got(path: str, value: Any, expected: str, settings: Settings) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    words = {"str": "text", "dict": "map", "float": "number", "int": "integer", "list": "list"}
    kind = words.get(type(value).__name__)
    got = "null" if value is None else f"{shown} ({kind})" if kind else shown
    return f"{path}: got {got}, expected {expected}{_from(path, settings)}"


def _from(path: str, settings: Settings) -> str:
    origin = settings.origin(path.partition("[")[0])
    return f" ({origin})" if origin else ""


def _path(error: ErrorDetails, knobs: Mapping[str, Knob]) -> str:
    """The dotted path of a mistake, without pydantic's names of union alternatives."""
    path = ""
    parts = error["loc"]
    for index, part in enumerate(parts):
        longer = f"{path}.{part}" if path else str(part)
        if isinstance(part, int):
            path = f"{path}[{part}]"
        elif _schema_path(longer) in knobs or (
            error["type"] == "extra_forbidden" and index == len(parts) - 1
        ):
            path = longer
    return path


def _schema_path(path: str) -> str:
    """``hooks[2].name`` as the schema has it, ``hooks[].name``."""
    return re.sub(r"\[\d+\]", ITEM, path)


def _keys_of(path: str, knobs: Mapping[str, Knob]) -> list[str]:
    """The keys that the section at a path may have."""
    inside = [knob for knob in knobs.values() if knob.parent == _schema_path(path)]
    return [knob.name for knob in inside if not knob.path.endswith(ITEM)]


def _value_at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
