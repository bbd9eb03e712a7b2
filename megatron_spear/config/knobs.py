"""The schema as a list of knobs: path, what is expected, types.

Everything that speaks about settings by name (error messages, the test that each knob is read) uses
this one walk.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_spear.config.schema import RunConfig

ITEM = "[]"
"""How the path of a list's entry ends, whichever entry it is."""

LIST_OF = "a list, each entry "
"""How the expected value of a list begins."""

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
}
_SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """One setting, or one section, of the run configuration.

    Example: ``Knob(path="rollout.group_size", expected="an integer >= 1", is_section=False,
    types=(int,))``; ``types`` are the plain types a value may have. A list of sections is a knob
    (``hooks``), and its entries are one section (``hooks[]``) with knobs (``hooks[].name``).
    """

    path: str
    expected: str
    is_section: bool
    types: tuple[type, ...]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def parent(self) -> str:
        """The path of the section it is in; empty at the top, the list's for an entry."""
        if self.path.endswith(ITEM):
            return self.path.removesuffix(ITEM)
        return self.path.rpartition(".")[0]


@cache
def schema_paths(model: type[BaseModel] = RunConfig) -> tuple[Knob, ...]:
    """Every knob and section of the schema, in schema order, parents before their children.

    A knob that several alternatives of a section have (``algorithm.loss.type``) comes once, with
    what any of them expects.
    """
    found: dict[str, Knob] = {}
    for knob in _walk(model, ""):
        before = found.setdefault(knob.path, knob)
        if before.expected != knob.expected:
            found[knob.path] = replace(before, expected=f"{before.expected}, or {knob.expected}")
    return tuple(found.values())


@cache
def known_paths(model: type[BaseModel] = RunConfig) -> Mapping[str, Knob]:
    """The knobs of the run configuration (or of another model) by path."""
    return types.MappingProxyType({knob.path: knob for knob in schema_paths(model)})


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Knob]:
    for name, info in model.model_fields.items():
        path = prefix + name
        alternatives = tuple(members(info.annotation))
        sections = [m for m in alternatives if isinstance(m, type) and issubclass(m, BaseModel)]
        yield Knob(
            path=path,
            expected=_expected(info),
            is_section=bool(sections) and len(alternatives) == 1,
            types=tuple(m for m in alternatives if isinstance(m, type)),
        )
        for section in sections:
            yield from _walk(section, path + ".")
        if (entry := section_of_list(info.annotation)) is not None:
            yield Knob(path=path + ITEM, expected=_describe(entry), is_section=True, types=(entry,))
            yield from _walk(entry, path + ITEM + ".")


def section_of_list(annotation: Any) -> type[BaseModel] | None:
    """The section that each entry of a list is; None for any other value."""
    entry = get_args(annotation)[0] if get_origin(annotation) in (tuple, list) else None
    return entry if isinstance(entry, type) and issubclass(entry, BaseModel) else None


def members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union without ``Annotated``; a Literal stays one member."""
    if get_origin(annotation) is Annotated:
        yield from members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from members(part)
    else:
        yield annotation


def _expected(info: FieldInfo) -> str:
    return _describe(info.annotation, tuple(info.metadata))


def _describe(annotation: Any, bounds: tuple[Any, ...] = ()) -> str:
    """What a value must be, in words: ``an integer >= 1, or null``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(args[0], bounds + _flatten(args[1:]))
    if origin in (Union, types.UnionType):
        return ", or ".join(_describe(part, bounds if part in _WORDS else ()) for part in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin in (tuple, list):
        return LIST_OF + _describe(args[0])
    if origin is dict:
        return "a map"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a map with keys among {', '.join(annotation.model_fields)}"
    limits = " and ".join(
        f"{sign} {getattr(bound, kind.__name__.lower()):g}"
        for bound in bounds
        for kind, sign in _SIGNS.items()
        if isinstance(bound, kind)
    )
    return f"{_WORDS.get(annotation, str(annotation))} {limits}".rstrip()


def _flatten(metadata: tuple[Any, ...]) -> tuple[Any, ...]:
    """The bounds inside ``Field(ge=..., le=...)`` objects."""
    found: list[Any] = []
    for item in metadata:
        found.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return tuple(found)
