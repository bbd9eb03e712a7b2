"""The hash of game files is of their content, and games that cannot be won are told by name."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_spear.envs.alfworld.game import GameFile
from megatron_spear.envs.alfworld.sources import games_sha256, load_games, require_winnable
from megatron_spear.errors import DataError


def write(path: Path, *games: GameFile) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(game.to_fields()) + "\n" for game in games))
    return path


def test_the_hash_of_packed_games(tmp_path: Path, game_file: GameFile) -> None:
    other = dataclasses.replace(game_file, task="Your task is to: put a mug in drawer.")
    one = write(tmp_path / "a" / "train.jsonl", game_file)
    before = games_sha256(one)
    assert games_sha256(tmp_path / "a", split="train") == before
    write(tmp_path / "a" / "valid_seen.jsonl", other)
    assert games_sha256(tmp_path / "a", split="train") == before, "another split"
    assert games_sha256(tmp_path / "a") != before
    assert games_sha256(write(tmp_path / "b" / "train.jsonl", game_file)) == before
    write(one, other)
    assert games_sha256(one) != before
    with pytest.raises(DataError, match="no such file or folder"):
        games_sha256(tmp_path / "absent")


def test_the_hash_of_a_tree(write_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = write_tree("train")
    before = games_sha256(root, split="train")
    assert games_sha256(root / "json_2.1.1" / "train") == before
    copy = tmp_path / "copy"
    shutil.copytree(root / "json_2.1.1", copy)
    assert games_sha256(copy, split="train") == before
    (file,) = copy.rglob("game.tw-pddl")
    file.write_text(file.read_text() + " ")
    assert games_sha256(copy, split="train") != before
    shutil.move(file.parent, file.parent.with_name("trial_T2"))
    moved = games_sha256(copy, split="train")
    (file,) = copy.rglob("game.tw-pddl")
    file.write_text(file.read_text()[:-1])
    assert before != games_sha256(copy, split="train") != moved, "the id is the folder's name"


@pytest.mark.parametrize("recorded", [None, [], ["dance"]])
def test_a_game_with_a_way_to_win(game_file: GameFile, recorded: list[str] | None) -> None:
    """By its walkthrough, or by the planner's where that is missing or outdated."""
    if recorded is not None:
        game_file = dataclasses.replace(game_file, walkthrough=recorded)
    require_winnable(game_file)


def test_a_game_without_one_is_named(game_file: GameFile) -> None:
    problem = game_file.problem.replace("(canContain DrawerType MugType)", "")
    broken = dataclasses.replace(game_file, problem=problem)
    assert broken.solvable and broken.walkthrough
    with pytest.raises(DataError, match=f"game {game_file.id} cannot be won: no drawer that takes"):
        require_winnable(broken)


def test_games_left_out_are_counted_in_one_line(
    tmp_path: Path, game_file: GameFile, caplog: pytest.LogCaptureFixture
) -> None:
    marked = dataclasses.replace(game_file, solvable=False)
    path = write(tmp_path / "a.jsonl", marked, game_file, marked)
    with caplog.at_level(logging.INFO):
        assert load_games(path, skip_unsolvable=True) == [game_file]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: left out 2 games marked unsolvable"
    ]
