"""From ``env.type=custom`` to a family, and every way in which that cannot be done."""

import asyncio
from pathlib import Path

import pytest

from megatron_spear.config.load import load_config
from megatron_spear.envs.family import family_of
from megatron_spear.errors import ConfigError
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.testing.environment_servers import environment_server
from megatron_spear.trainer.own_code import own_code

GOOD = """
from megatron_spear.config.base import PositiveInt
from megatron_spear.envs.family import EnvironmentFamily
from megatron_spear.envs.simple import SimpleFamily
from megatron_spear.testing.toy_environment import CorridorEnvironment


class Walk(CorridorEnvironment):
    pass


class Plain(SimpleFamily):
    environment = Walk
    task_kinds = ("one",)

    def make_task(self, rng):
        return {"length": rng.randint(3, 90)}


class Sized(Plain):
    class Settings(EnvironmentFamily.Settings):
        size: PositiveInt
        colour: str = "red"

    def __init__(self, settings):
        self.settings = settings


class Raises(Plain):
    def __init__(self):
        raise KeyError("no such map")


class Unfinished(EnvironmentFamily):
    def view(self):
        return None


class NoFactory(Plain):
    factory = "nowhere"


class LostFactory(Plain):
    factory = "megatron_spear.testing.toy_environment:NoSuchCorridor"


class Other:
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "walks.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _config(name, *settings):
    overrides = ["env.type=custom", f"env.family=walks.py:{name}", *settings]
    return load_config(None, overrides)


def test_a_file_gives_a_family_that_workers_find(folder):
    family = family_of(_config("Plain").env)
    assert family.factory == f"{folder}/walks.py:Walk"
    assert family.training(0, 1).at(0).metadata["length"] >= 3


def test_settings_are_the_classs_own():
    config = _config("Sized", "env.settings.size=4")
    assert family_of(config.env).settings.model_dump() == {"size": 4, "colour": "red"}
    assert load_config(None, ["env.type=custom", "env.family=a.b:C"]).env.settings == {}


@pytest.mark.parametrize("kind", ["own", "remote"])
def test_a_worker_makes_environments_of_the_file(kind, folder, tmp_path, monkeypatch):
    family = family_of(_config("Plain").env)
    monkeypatch.chdir("/")

    async def play(remote):
        pool = EnvironmentPool(family.factory, workers=1, deadline_s=60.0, remote=remote)
        with pool:
            async with pool.slot() as slot:
                options = {"length": 3, "start": 0}
                observation, _ = await pool.reset(slot, seed=0, options=options)
                return observation, await pool.step(slot, "right")

    if kind == "own":
        observation, result = asyncio.run(play(None))
    else:
        (tmp_path / "server").mkdir()
        with environment_server(tmp_path / "server") as remote:
            observation, result = asyncio.run(play(remote))
    assert observation.startswith("walk to place 2") and result.observation == "you are at place 1"


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Plane", [], "env.family: walks.py:Plane: walks.py has no Plane; did you mean Plain?"),
        ("Zzz", [], "its environment families are: SimpleFamily, Plain, Sized"),
        ("Other", [], "Other is a class, expected a subclass of megatron_spear.envs.family.Env"),
        ("Raises", [], "Raises() raised KeyError: 'no such map' (walks.py:"),
        ("Unfinished", [], "Unfinished has no panel and no training; add it"),
        ("NoFactory", [], "NoFactory().factory is 'nowhere', expected a text"),
        ("Plain", ["env.settings.size=1"], "env.settings: got size, but Plain has no settings"),
        ("Sized", [], "env.settings.size: missing, expected an integer >= 1"),
        ("Sized", ["env.settings.size=0"], "env.settings.size: got 0 (integer), expected an int"),
        (
            "Sized",
            ["env.settings={size: 1, color: red}"],
            "env.settings.color: no such key; did you mean colour?",
        ),
    ],
)
def test_each_mistake_is_told(name, settings, expected):
    with pytest.raises(ConfigError) as told:
        family_of(_config(name, *settings).env)
    assert expected in str(told.value)


def test_a_missing_file_and_a_wrong_form_are_told():
    with pytest.raises(ConfigError, match=r"there is no file absent.py .relative paths start"):
        family_of(load_config(None, ["env.type=custom", "env.family=absent.py:A"]).env)
    with pytest.raises(ConfigError, match=r"env.family: got 'walks', expected 'package.module:Cl"):
        load_config(None, ["env.type=custom", "env.family=walks"])
    with pytest.raises(ConfigError, match=r"env.family: missing"):
        load_config(None, ["env.type=custom"])


def test_mistakes_in_environment_and_hooks_are_told_at_once():
    hook = "hooks=[{name: a, path: 'absent.py:Hook'}]"
    with pytest.raises(ConfigError) as told:
        own_code(_config("Sized", "env.settings={size: 0, color: red}", hook))
    for words in (
        "this environment cannot be used (docs/environments.md)",
        "env.settings.size: got 0",
        "env.settings.color: no such key",
        "these hooks cannot be used",
        "hooks[0].path: absent.py:Hook",
    ):
        assert words in str(told.value)


def test_what_workers_would_not_find_is_told():
    assert own_code(_config("LostFactory")) == {}
    with pytest.raises(ConfigError, match="NoSuchCorridor is not there, expected something"):
        own_code(_config("LostFactory"), environment_too=True)


def test_a_curriculum_needs_kinds():
    with pytest.raises(ConfigError, match=r"draws over kinds of tasks .* and there is one"):
        own_code(_config("Plain", "curriculum.tasks.enabled=true"))
