"""docs/configuration.md is what the schema gives now, and has every setting."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from megatron_spear.config.base import PositiveInt, Section
from megatron_spear.config.knobs import schema_paths

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ref", ROOT / "tools" / "config_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(tool: ModuleType) -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page == tool.text(), "run python tools/config_reference.py"


def test_every_setting_has_an_anchor_and_a_meaning(tool: ModuleType) -> None:
    rows = re.findall(r'^\| (?:<a id="([^"]+)"></a>)?`([^`]+)` \| (.*) \| (.*) \| (.*) \|$',
                      tool.text(), re.M)  # fmt: skip
    anchors = [anchor for anchor, *_ in rows if anchor]
    assert len(anchors) == len(set(anchors)) > 250
    named = {path for _, path, *_ in rows}
    wanted = {knob.path for knob in schema_paths() if not knob.path.endswith("[]")}
    assert wanted == named, wanted ^ named
    assert all(values and text for _, _, values, _, text in rows)


def test_links_within_the_page_have_a_heading(tool: ModuleType) -> None:
    page = tool.text()
    headings = {tool._slug(title) for title in re.findall(r"^#+ (.*)$", page, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings


class _Small(Section):
    """A kind."""

    type: Literal["small"] = "small"
    """Which."""
    size: PositiveInt = 3
    """Size in ``units``; None = <none>."""


class _Whole(Section):
    """Of all."""

    part: _Small | None = _Small(size=5)
    """The part."""


def test_a_table_by_hand(tool: ModuleType) -> None:
    whole = _Whole()
    (section,) = tool._sections(_Whole, whole, "")
    heading, said, table = tool._written(section, True, set())
    assert heading == "## part: small" and said == "The part. A kind."
    assert table.splitlines()[2:] == [
        '| <a id="part.type"></a>`part.type` | `small` | `small` | Which. |',
        '| <a id="part.size"></a>`part.size` | an integer ≥ 1 | `5` '
        "| Size in `units`; `null` = &lt;none>. |",
    ]
    (row,) = tool._written(tool._Section("", "top", "", _Whole, whole), False, set())[2:]
    assert "| [part: small](#part-small), or `null` | `small` | The part. |" in row
