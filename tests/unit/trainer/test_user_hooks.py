"""From ``hooks:`` in the settings to objects, and every way in which that cannot be done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.config.hooks import HookSection
from megatron_spear.config.load import load_config
from megatron_spear.errors import ConfigError
from megatron_spear.rollout.token_texts import TokenTexts
from megatron_spear.trainer.build import make_hooks
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.user import user_hooks

GOOD = '''
from dataclasses import dataclass

from pydantic import model_validator

from megatron_spear.config.base import PositiveInt
from megatron_spear.trainer.hooks.base import Hook


class Plain(Hook):
    """Has no settings."""


class Bonus(Hook):
    class Settings(Hook.Settings):
        bonus: float
        size: PositiveInt = 3
        names: tuple[str, ...] = ()

        @model_validator(mode="after")
        def _fits(self):
            if self.bonus > self.size:
                raise ValueError(f"bonus={self.bonus:g} is above size={self.size}; lower it")
            return self

    def __init__(self, settings):
        self.settings = settings


class Raises(Hook):
    def __init__(self):
        raise KeyError("no such table")


class NoSettings(Hook):
    def __init__(self, bonus):
        self.bonus = bonus


class OddSettings(Hook):
    class Settings:
        bonus = 1.0


@dataclass
class Other:
    bonus: float = 0.0


def make():
    return Plain()
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory and Python's path, with ``good_hooks.py``."""
    (tmp_path / "good_hooks.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "good_hooks", raising=False)
    return tmp_path


def _entry(path: str, name: str = "mine", **settings: Any) -> HookSection:
    return HookSection(name=name, path=path, settings=settings)


def _mistakes(*entries: HookSection) -> list[str]:
    with pytest.raises(ConfigError) as told:
        user_hooks(entries)
    first, *lines = str(told.value).splitlines()
    assert "docs/hooks.md" in first
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    "module", ["good_hooks", "good_hooks.py", "./good_hooks.py", "{}/good_hooks.py"]
)
def test_a_module_or_a_file(module: str, folder: Path) -> None:
    module = module.format(folder)
    found = user_hooks(
        [_entry(f"{module}:Plain", "b"), _entry(f"{module}:Bonus", "a", bonus=0.5, names=["x"])]
    )
    assert list(found) == ["b", "a"], "in the order of the settings"
    assert [type(hook).__name__ for hook in found.values()] == ["Plain", "Bonus"]
    settings: Any = found["a"]
    assert settings.settings.model_dump() == {"bonus": 0.5, "size": 3, "names": ("x",)}


def test_a_file_is_imported_once_and_each_entry_has_a_hook_of_its_own() -> None:
    entries = [_entry("good_hooks.py:Plain", "a"), _entry("./good_hooks.py:Plain", "b")]
    found = user_hooks(entries)
    assert type(found["a"]) is type(found["b"]) and found["a"] is not found["b"]
    assert type(user_hooks(entries)["a"]) is type(found["a"])


@pytest.mark.parametrize(
    ("path", "settings", "expected"),
    [
        ("absent_package.hooks:Plain", {}, "no module 'absent_package' on Python's path; put the"),
        ("absent_package.hooks:Plain", {}, "on PYTHONPATH, install it, or name the file, FILE.py:"),
        ("good_hooks.more:Plain", {}, "there is no module 'good_hooks.more' on Python"),
        ("./absent.py:Plain", {}, "there is no file ./absent.py (relative paths start at the cur"),
        ("good_hooks:Plian", {}, "good_hooks has no Plian; did you mean Plain?"),
        ("good_hooks.py:Zzz", {}, "its hooks are: Plain, Bonus, Raises, NoSettings, OddSettings"),
        ("good_hooks:Other", {}, "Other is a class, expected a subclass of megatron_spear.trainer"),
        ("good_hooks:make", {}, "make is a function, expected a subclass of"),
        ("good_hooks:Raises", {}, "Raises() raised KeyError: 'no such table' (good_hooks.py:"),
        ("good_hooks:NoSettings", {}, "NoSettings() raised TypeError"),
        ("good_hooks:Plain", {"bonus": 1}, "settings: got bonus, but Plain has no settings; take"),
        ("good_hooks:OddSettings", {}, "OddSettings.Settings is no subclass of Hook.Settings"),
        ("good_hooks:Bonus", {}, "settings.bonus: missing, expected a number"),
        (
            "good_hooks:Bonus",
            {"bonus": "much"},
            "settings.bonus: got 'much' (text), expected a num",
        ),
        ("good_hooks:Bonus", {"bonus": True}, "settings.bonus: got True, expected a number"),
        ("good_hooks:Bonus", {"bonus": 1, "size": 0}, "got 0 (integer), expected an integer >= 1"),
        (
            "good_hooks:Bonus",
            {"bonus": 1, "names": [1]},
            "names[0]: got 1 (integer), expected a te",
        ),
        (
            "good_hooks:Bonus",
            {"bonus": 1, "bnus": 1},
            "settings.bnus: no such key; did you mean bon",
        ),
        ("good_hooks:Bonus", {"bonus": 9}, "hooks[0].settings: bonus=9 is above size=3; lower it"),
    ],
)
def test_each_mistake_names_the_entry(path: str, settings: dict[str, Any], expected: str) -> None:
    (line,) = _mistakes(_entry(path, **settings))
    assert expected in line and line.startswith("hooks[0].")
    assert path in line or "settings" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(:\n", "raised SyntaxError: invalid syntax (broken.py, line 1)"),
        ("import math\nx = math.sqrt(-1)\n", "raised ValueError: math domain error (broken.py:2)"),
        ("\nimport nowhere_to_be_found\n", "No module named 'nowhere_to_be_found' (broken.py:2)"),
        ("\nraise SystemExit(3)\n", "raised SystemExit: 3 (broken.py:2)"),
    ],
)
@pytest.mark.parametrize("module", ["broken", "broken.py"])
def test_a_module_that_cannot_be_imported(
    module: str, text: str, expected: str, folder: Path
) -> None:
    (folder / "broken.py").write_text(text)
    for _ in range(2):  # a failed import leaves nothing behind
        (line,) = _mistakes(_entry(f"{module}:Plain"))
        assert line.startswith(f"hooks[0].path: {module}:Plain: importing {module} raised")
        assert expected in line


def test_all_mistakes_are_told_at_once() -> None:
    lines = _mistakes(
        _entry("good_hooks:Plain", "a"),
        _entry("good_hooks:Bonus", "b", size=0, colour="red"),
        _entry("nowhere:Hook", "c"),
    )
    assert [line.split(":")[0] for line in lines] == [
        "hooks[1].settings.bonus",
        "hooks[1].settings.size",
        "hooks[1].settings.colour",
        "hooks[2].path",
    ]


def test_the_users_hooks_come_before_replay(folder: Path) -> None:
    own = {"b": Hook(), "a": Hook()}
    for settings, last in (
        ([], ["built_in.self_imitation"]),
        (["algorithm.compat=official"], ["built_in.official_replay"]),
        (["replay.enabled=false"], []),
    ):
        hooks = make_hooks(load_config(None, settings), folder, own, TokenTexts(str))
        assert list(hooks.state_dict(0)) == ["b", "a", *last]


def test_making_them_takes_no_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "from megatron_spear.cli.main import run\n"
        "run(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\n"
    )
    entry = json.dumps([{"name": "a", "path": "good_hooks.py:Plain"}])
    (folder / "a.yaml").write_text(f"hooks: {entry}\n")
    done = subprocess.run(
        [sys.executable, "-c", code, "check-config", "a.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "path: good_hooks.py:Plain" in done.stdout
