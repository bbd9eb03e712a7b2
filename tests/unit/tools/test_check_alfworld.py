"""The transcript checker compares admissible actions whatever their order."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.envs.alfworld.engine import admissible_actions
from megatron_spear.envs.alfworld.game import GameFile, GameState, parse_game
from megatron_spear.envs.alfworld.task import fresh_game
from megatron_spear.envs.alfworld.text import intro

TOOL = Path(__file__).parents[3] / "tools" / "check_alfworld.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_alfworld", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def game() -> GameFile:
    made: GameFile = fresh_game(0, 0, ("pick_and_place_simple",), GeneratorSection())
    return made


def _differences(tool: ModuleType, game: GameFile, admissible: Any) -> list[str]:
    """Those of the first entry, when these were the recorded admissible actions."""
    entry = {"action": None, "feedback": intro(GameState(parse_game(game))), "won": False}
    (found,) = tool.replay(game, [{**entry, "admissible": admissible}])
    return list(found)


def test_admissible_actions_are_a_set(tool: ModuleType, game: GameFile) -> None:
    actions = admissible_actions(GameState(parse_game(game)))
    assert len(actions) > 2
    assert _differences(tool, game, actions) == []
    assert _differences(tool, game, actions[::-1]) == []
    for wrong in (actions[1:], [*actions, "dance"], [*actions, actions[0]], actions[0], None):
        (line,) = _differences(tool, game, wrong)
        assert line.startswith("admissible: got ")
