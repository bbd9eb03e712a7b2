"""Families without a table go through megatron-bridge; a stand-in has its names."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_spear.conversion.convert import Layout, hf_to_megatron, megatron_to_hf
from megatron_spear.errors import CheckpointError, ConfigError

calls: list[tuple[str, ...]] = []


class AutoBridge:
    """megatron-bridge 0.6's entry, which notes what it is asked for."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @classmethod
    def can_handle(cls, path: str) -> bool:
        return not path.endswith("odd")

    @classmethod
    def from_hf_pretrained(cls, path: str) -> "AutoBridge":
        return cls(path)

    @classmethod
    def import_ckpt(cls, hf_model_id: str, megatron_path: str, **kwargs: Any) -> None:
        calls.append(("import", hf_model_id, megatron_path))

    def export_ckpt(
        self, megatron_path: str, hf_path: str, show_progress: bool = True, strict: bool = False
    ) -> None:
        assert strict
        calls.append(("export", self.folder, megatron_path, hf_path))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPT-2 folder, with megatron-bridge installed."""
    calls.clear()
    module = ModuleType("megatron.bridge")
    module.AutoBridge = AutoBridge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return tmp_path / "gpt2"


def test_both_ways(folder: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    hf_to_megatron(folder, there, Layout())
    megatron_to_hf(there, back, config=folder)
    assert calls == [
        ("import", str(folder), str(there)),
        ("export", str(folder), str(there), str(back)),
    ]


def test_settings_it_does_not_take_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"takes no --tensor-parallel, --dtype; leave it out"):
        hf_to_megatron(folder, tmp_path / "there", Layout(tensor=2), dtype="bf16")
    with pytest.raises(CheckpointError, match="takes no --dtype"):
        megatron_to_hf(tmp_path / "there", tmp_path / "back", config=folder, dtype="fp8-block")
    assert calls == []


def test_what_nobody_knows_is_refused(folder: Path, tmp_path: Path) -> None:
    odd = folder.rename(tmp_path / "odd")
    with pytest.raises(ConfigError, match="neither a weight table nor megatron-bridge"):
        hf_to_megatron(odd, tmp_path / "there", Layout())
