"""docs/faults.md names tests that are there, and settings that are."""

import ast
import re
from pathlib import Path

from megatron_spear.config.fingerprint import _flat
from megatron_spear.config.load import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
SETTING = re.compile(r"`((?:run|rollout|weight_sync|cluster)(?:\.\w+)+)`")


def test_every_fault_has_its_test() -> None:
    rows = [line for line in PAGE.partition("## Faults and their tests")[2].splitlines() if line]
    faults = [row for row in rows if row.startswith("|")][2:]
    assert len(faults) > 30
    for row in faults:
        file, name = TEST.findall(row)[0]
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"


def test_every_deadline_is_a_setting() -> None:
    settings = {path for path, _ in _flat(load_config())}
    named = set(SETTING.findall(PAGE))
    assert {"run.hang_limit_s", "weight_sync.deadline_s"} <= named
    assert named <= settings, named - settings
