"""The evaluation panel and games as prompts."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.envs.alfworld.game import GameFile
from megatron_spear.envs.alfworld.task import (
    Panel,
    fresh_game,
    game_prompt,
    make_panel,
    training_games,
)
from megatron_spear.errors import DataError
from megatron_spear.types import TASK_TYPES


def _games(panel: Panel) -> list[GameFile]:
    return [GameFile(**prompt.metadata["game"]) for prompt in panel.prompts]


def _ids(panel: Panel) -> list[str]:
    return [prompt.prompt_id for prompt in panel.prompts]


@pytest.fixture
def loaded(tmp_path: Path) -> AlfworldSection:
    """Ten games of the evaluation split, in no order, and three of the training split."""
    env = AlfworldSection()
    games = [fresh_game(1, i, env.task_types, env.generator) for i in range(13)]
    for split, rows in (("valid_seen", games[:10]), ("train", games[10:])):
        text = "\n".join(json.dumps(game.to_fields()) for game in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    return AlfworldSection(games=tmp_path)


@pytest.fixture(scope="module")
def panel() -> Panel:
    return make_panel(AlfworldSection(), 24, seed=6)


def test_the_same_seed_gives_the_same_panel_everywhere(panel: Panel) -> None:
    assert make_panel(AlfworldSection(), 24, seed=6) == panel
    digest = hashlib.sha256()
    for game in _games(panel):
        digest.update(json.dumps([game.id, game.problem]).encode())
    assert panel.sha256 == digest.hexdigest()
    other = make_panel(AlfworldSection(), 24, seed=7)
    assert other.sha256 != panel.sha256 and not set(_ids(other)) & set(_ids(panel))


def test_the_panel_of_a_seed_does_not_change_between_versions() -> None:
    """Results on panels of different content do not compare: change this number knowingly."""
    assert make_panel(AlfworldSection(), 4, seed=0).sha256[:16] == "6b3affea43bf45b7"


def test_games_have_the_asked_size_and_number(panel: Panel) -> None:
    assert len(panel.prompts) == len(set(_ids(panel))) == 24
    counts = [game.num_receptacles for game in _games(panel)]
    assert min(counts) >= 8 and max(counts) <= 12 and len(set(counts)) > 1
    task_types = {i.split("-")[0] for i in _ids(panel)}
    assert task_types <= set(TASK_TYPES) and len(task_types) > 3


def test_a_longer_panel_begins_with_the_shorter_one(panel: Panel) -> None:
    assert make_panel(AlfworldSection(), 5, seed=6).prompts == panel.prompts[:5]


@pytest.mark.parametrize(
    ("size", "taken"), [(10, range(10)), (4, [0, 2, 5, 7]), (3, [0, 3, 6]), (1, [0])]
)
def test_loaded_games_are_spread_over_the_sorted_split(
    loaded: AlfworldSection, size: int, taken: Sequence[int]
) -> None:
    everything = sorted(fresh_game(1, i, TASK_TYPES, loaded.generator).id for i in range(10))
    panel = make_panel(loaded, size, seed=0)
    assert _ids(panel) == [everything[i] for i in taken]
    assert make_panel(loaded, size, seed=99) == panel, "the seed is of generated games"


def test_too_few_loaded_games_are_refused(loaded: AlfworldSection) -> None:
    with pytest.raises(DataError, match=r"got 11, .*valid_seen.* has only 10 fitting games"):
        make_panel(loaded, 11, seed=0)
    few = loaded.model_copy(update={"task_types": ("look_at_obj_in_light",)})
    with pytest.raises(DataError):
        make_panel(few, 10, seed=0)


def test_training_games_are_those_of_the_training_split(loaded: AlfworldSection) -> None:
    own = [fresh_game(1, i, TASK_TYPES, loaded.generator) for i in (10, 11, 12)]
    assert training_games(loaded) == own


def test_a_prompt_holds_the_reset_options() -> None:
    game = fresh_game(0, 0, ("look_at_obj_in_light",), AlfworldSection().generator)
    made = game_prompt(game)
    assert made.prompt_id == game.id and game.task_type == "look_at_obj_in_light"
    assert made.env == "alfworld" and made.messages == ()
    assert made.metadata == {"game": game.to_fields()}
