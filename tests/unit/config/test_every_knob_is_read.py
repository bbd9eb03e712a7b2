"""A knob nobody reads is a lie: each field of the schema is read somewhere outside ``config/``.

A field counts as read in a file that has the attribute ``.field`` and also names the field's
section, by its class (``RolloutSection``) or by its attribute (``.rollout``). A field that names an
entry of a table counts as read where the table is looked up with it.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import megatron_spear
from megatron_spear.config.knobs import Knob, schema_paths
from megatron_spear.config.schema import RunConfig

PACKAGE = Path(megatron_spear.__file__).parent

BY_VALUE = {"env.type", "algorithm.loss.type", "replay.loss.type", "cluster.runtime.type"}
"""Fields that choose a class of the schema: read by pydantic."""

BY_TABLE = {"rollout.engine": "SERVERS"}
"""Fields that name an entry of a table, with the table."""


def _section_classes(model: type[BaseModel], path: str) -> Iterator[tuple[str, str]]:
    """(path of a section, name of its class), the top first."""
    yield path, model.__name__
    for knob in schema_paths(model):
        for kind in knob.types:
            if issubclass(kind, BaseModel):
                yield f"{path}.{knob.path}".lstrip("."), kind.__name__


def _names_by_file() -> dict[Path, set[str]]:
    """Attributes and names that each source file outside config/ uses."""
    found: dict[Path, set[str]] = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        if PACKAGE / "config" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found[path].add("." + node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Attribute):
                found[path].add(f"{ast.unparse(node.value)}[.{node.slice.attr}]")
            elif isinstance(node, ast.Name):
                found[path].add(node.id)
            elif isinstance(node, ast.alias):
                found[path].add(node.name)
    return found


CLASSES: dict[str, set[str]] = defaultdict(set)
for _path, _name in _section_classes(RunConfig, ""):
    CLASSES[_path].add(_name)
USED = _names_by_file()
LEAVES = [k for k in schema_paths() if not k.is_section and k.path not in {*BY_VALUE, *BY_TABLE}]


@pytest.mark.parametrize("knob", LEAVES, ids=lambda knob: knob.path)
def test_is_read_outside_config(knob: Knob) -> None:
    parent = knob.path.rpartition(".")[0]
    section = {*CLASSES[parent], "." + parent.rpartition(".")[2]}
    readers = [p for p, names in USED.items() if "." + knob.name in names and section & names]
    assert readers, f"{knob.path} is read nowhere: wire it up or take it out of the schema"


@pytest.mark.parametrize("path", BY_TABLE)
def test_chooses_from_its_table(path: str) -> None:
    looked_up = f"{BY_TABLE[path]}[.{path.rpartition('.')[2]}]"
    assert any(looked_up in names for names in USED.values()), f"{path} is not looked up"


def test_the_test_can_fail() -> None:
    assert not any(".no_such_knob" in names for names in USED.values())
    assert CLASSES["sft.optimizer"] == {"OptimizerSection"}
    assert CLASSES["env.history"] == {"WindowHistory"}
    assert len(CLASSES["algorithm.loss"]) == 4
    assert CLASSES["hooks[]"] == {"HookSection"}
    assert "hooks[].settings" in {knob.path for knob in LEAVES}
