"""The example of docs/environments.md is a family that keeps the contract, and its test passes."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.envs.adapters.library import _EXTRAS
from megatron_spear.envs.family import _FAMILIES, family_of
from megatron_spear.testing import families

PAGE = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    game, test = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "echo_game.py").write_text(game)
    (tmp_path / "page_test.py").write_text(test)
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "echo.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_test_passes(folder: Path) -> None:
    names = runpy.run_path(str(folder / "page_test.py"))
    names["test_echo_game_keeps_the_contract"]()


def test_the_pages_settings_load(folder: Path) -> None:
    config = load_config(folder / "echo.yaml")
    family = family_of(config.env)
    assert family.factory == f"{folder}/echo_game.py:Backwards" and not config.sft.enabled
    assert yaml.safe_load((folder / "echo.yaml").read_text())["env"]["type"] == "custom"
    assert "torch" not in sys.modules[f"file {folder}/echo_game.py"].__dict__


def test_every_check_and_kind_of_environment_is_on_the_page() -> None:
    checks = [name for name in vars(families) if name.startswith("check_")]
    own = [name for name in checks if vars(families)[name].__module__ == families.__name__]
    assert len(own) == 8
    for name in (*own, *_FAMILIES, *_EXTRAS.values()):
        assert f"`{name}`" in PAGE, name
    assert RunConfig.model_fields["env"].discriminator == "type"
