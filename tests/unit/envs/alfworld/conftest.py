"""Fixtures: a small hand-written game, and ways to break or rebuild its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.envs.alfworld.game import Game, GameFile, GameState
from megatron_spear.envs.alfworld.rules import ACTIONS, FEEDBACK

SHARED = Path(__file__).parents[4] / ".." / "shared"

CLEAN_MUG_PLAN = [
    "go to countertop 1",
    "take mug 2 from countertop 1",
    "go to sinkbasin 1",
    "clean mug 2 with sinkbasin 1",
    "go to drawer 1",
    "move mug 2 to drawer 1",
]


@pytest.fixture(scope="session")
def problem() -> str:
    """The PDDL problem of the small game."""
    return (Path(__file__).parent / "small_game.pddl").read_text(encoding="utf-8")


@pytest.fixture
def game_file(problem: str) -> GameFile:
    """The small game: put a clean mug in a drawer."""
    return GameFile(
        id="pick_clean_then_place_in_recep-Mug-None-Drawer-1/trial_T1",
        task="Your task is to: put a clean mug in drawer.",
        walkthrough=list(CLEAN_MUG_PLAN),
        solvable=True,
        problem=problem,
    )


@pytest.fixture
def state(game_file: GameFile) -> GameState:
    """The small game at its start."""
    return GameState(Game(game_file))


@pytest.fixture(scope="session")
def domain() -> str:
    """ALFWorld's PDDL domain; the project does not carry it."""
    path = SHARED / "data" / "alfworld" / "alfred.pddl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def grammar() -> str:
    """A grammar written from the engine's own tables, with a task."""
    symbols = {
        symbol: [{"condition": condition, "rhs": rhs} for condition, rhs in rules]
        for symbol, rules in FEEDBACK.items()
    }
    symbols["task"] = [{"rhs": "Your task is to: put a clean mug in drawer."}]
    parts = [f'grammar :: """\n{json.dumps(symbols, indent=4)}\n""";\n']
    for name, action in ACTIONS.items():
        parts.append(f'action {name} {{\n    template :: "{action.template}";')
        parts.append(f'    feedback :: "{action.feedback}";\n}}\n')
    return "\n".join(parts)


@pytest.fixture
def write_tree(
    tmp_path: Path, game_file: GameFile, domain: str, grammar: str
) -> Callable[..., Path]:
    """Writes a game in the official layout; keywords replace JSON entries (None drops one)."""

    def write(split: str = "train", task: str = game_file.id.split("/")[0], **changes: Any) -> Path:
        entries: dict[str, Any] = {
            "pddl_domain": domain,
            "grammar": grammar,
            "pddl_problem": game_file.problem,
            "solvable": True,
            "walkthrough": game_file.walkthrough,
            **changes,
        }
        folder = tmp_path / "json_2.1.1" / split / task / "trial_T1"
        folder.mkdir(parents=True)
        kept = {name: value for name, value in entries.items() if value is not None}
        (folder / "game.tw-pddl").write_text(json.dumps(kept), encoding="utf-8")
        return tmp_path

    return write
