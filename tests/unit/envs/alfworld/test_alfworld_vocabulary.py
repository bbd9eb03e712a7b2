"""The word list is closed: no text of any game holds another word."""

import json
import lzma
import random
from itertools import islice
from pathlib import Path

import pytest

from megatron_spear.config.environments.alfworld import GeneratorSection
from megatron_spear.envs.alfworld.demonstrations import demonstrate
from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.game import Game, GameState
from megatron_spear.envs.alfworld.generator import generate_game
from megatron_spear.envs.alfworld.prompts import OfficialView
from megatron_spear.envs.alfworld.rooms import ROOM_FIXTURES, ROOM_HABITS
from megatron_spear.envs.alfworld.sources import iter_games
from megatron_spear.envs.alfworld.text import intro
from megatron_spear.envs.alfworld.vocabulary import alfworld_words
from megatron_spear.envs.words import PUNCTUATION, split_words
from megatron_spear.types import TASK_TYPES

SHARED = Path(__file__).parents[4] / ".." / "shared"
WORDS = set(alfworld_words())


def assert_closed(texts: list[str]) -> None:
    missing = {word for text in texts for word in split_words(text)} - WORDS
    assert not missing, missing


def test_words_are_sorted_single_and_without_white_space() -> None:
    words = alfworld_words()
    assert list(words) == sorted(set(words))
    for word in words:
        assert word == word.strip() and word
        assert word in PUNCTUATION or split_words(word) == [word]
    assert 350 < len(words) < 450


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("On the desk 1, you see", ["On", "the", "desk", "1", ",", "you", "see"]),
        ("There's nothing", ["There", "'", "s", "nothing"]),
        ("<action>go</action>", ["<", "action", ">", "go", "<", "/", "action", ">"]),
    ],
)
def test_splitting(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_numbers_and_types_are_in() -> None:
    assert {str(number) for number in range(1, 41)} <= WORDS
    for room in ROOM_FIXTURES:
        assert {kind.lower() for kind in (*ROOM_FIXTURES[room], *ROOM_HABITS[room])} <= WORDS
    assert {"sinkbasin", "bathtubbasin", "desklamp"} <= WORDS


def test_generated_games_and_demonstrations_are_covered() -> None:
    for index in range(30):
        settings = GeneratorSection(max_receptacles=40, max_objects=80)
        game_file = generate_game(4, index, task_types=TASK_TYPES, settings=settings)
        rng = random.Random(index)
        shown = demonstrate(Game(game_file), rng, explore=6.0, noise=0.5, max_turns=90)
        assert shown is not None
        assert_closed([text for t in shown.turns for text in (t.observation, t.action)])
        assert_closed(game_file.walkthrough)


def test_random_play_is_covered() -> None:
    for index in range(12):
        settings = GeneratorSection()
        game_file = generate_game(5, index, task_types=TASK_TYPES, settings=settings)
        state, rng = GameState(Game(game_file)), random.Random(index)
        assert_closed([intro(state)])
        for _ in range(60):
            actions = admissible_actions(state)
            assert_closed(actions)
            assert_closed([act(state, rng.choice(actions)).feedback])


def test_the_official_prompt_is_covered() -> None:
    view, info = OfficialView(), {"admissible": ["go to desk 1", "look"]}
    steps = [("On the desk 1, you see nothing.", "look")] * 2
    for turn in range(1, 51):
        shown = [*view.window("", steps[:turn], "", info, turn), *view.full("", info, turn)]
        assert_closed([message["content"] for message in shown])
    assert_closed([message["content"] for message in view.full("", info, 0)])


def test_recorded_play_is_covered() -> None:
    path = SHARED / "golden" / "alfworld_transcripts.jsonl.xz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            for entry in json.loads(line)["transcript"]:
                assert_closed([entry["feedback"], *entry["admissible"]])


def test_official_games_are_covered() -> None:
    path = SHARED / "data" / "alfworld"
    if not path.exists():
        pytest.skip(f"needs {path}")
    for game_file in islice(iter_games(path, split="valid_seen"), 0, 140, 4):
        game = Game(game_file)
        assert_closed([game.task, intro(GameState(game)), *game_file.walkthrough])
        named = [name for entity, name in game.names.items() if "_bar_" in entity]
        assert_closed([name for name in named if not name.startswith("loc ")])
