"""Play recorded from TextWorld 1.7.0 with alfworld 0.4.2 against the native engine."""

import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.game import Game, GameState
from megatron_spear.envs.alfworld.sources import load_games
from megatron_spear.envs.alfworld.text import intro

SHARED = Path(__file__).parents[2] / ".." / "shared"
TRANSCRIPTS = SHARED / "golden" / "alfworld_transcripts.jsonl.xz"
GAMES = SHARED / "data" / "alfworld"


@pytest.fixture(scope="module")
def games():
    if not (GAMES / "valid_seen.jsonl.xz").exists():
        pytest.skip(f"needs {GAMES}/valid_seen.jsonl.xz")
    return {game.id: game for game in load_games(GAMES, split="valid_seen")}


@pytest.mark.parametrize("mode", ["walkthrough", "random", "mixed"])
def test_every_recorded_entry_is_reproduced(games, mode):
    if not TRANSCRIPTS.exists():
        pytest.skip(f"needs {TRANSCRIPTS}")
    with lzma.open(TRANSCRIPTS, "rt", encoding="utf-8") as stream:
        rows = [row for row in map(json.loads, stream) if row["mode"] == mode]
    assert len(rows) == 25
    for row in rows:
        state = GameState(Game(games[row["id"]]))
        for number, entry in enumerate(row["transcript"]):
            action = entry["action"]
            feedback = intro(state) if action is None else act(state, action).feedback
            where = (row["id"], number, action)
            assert feedback == entry["feedback"], where
            assert admissible_actions(state) == entry["admissible"], where
            assert state.won is entry["won"], where


@pytest.mark.parametrize(("split", "num_games"), [("valid_seen", 140), ("valid_train", 200)])
def test_every_walkthrough_wins_and_no_game_is_won_at_the_start(split, num_games):
    if not (GAMES / f"{split}.jsonl.xz").exists():
        pytest.skip(f"needs {GAMES}/{split}.jsonl.xz")
    loaded = load_games(GAMES, split=split)
    assert len(loaded) == num_games
    assert len(Counter(game.task_type for game in loaded)) == 6
    for game in loaded:
        state = GameState(Game(game))
        for action in game.walkthrough:
            assert not state.won, game.id
            assert action in admissible_actions(state), (game.id, action)
            assert act(state, action).valid, (game.id, action)
        assert state.won, game.id
