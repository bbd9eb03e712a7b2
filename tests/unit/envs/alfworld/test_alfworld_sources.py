"""Both layouts, the filters, and one clear error for each kind of bad input."""

import dataclasses
import json
import lzma

import pytest

from megatron_spear.envs.alfworld.sources import iter_games, load_games
from megatron_spear.errors import DataError


def write_rows(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


@pytest.fixture
def other(game_file):
    """A second game, of another type and with one receptacle less."""
    problem = game_file.problem.replace("(receptacleAtLocation Fridge_bar_1 loc_bar_5)", "")
    return dataclasses.replace(
        game_file, id="pick_and_place_simple-Mug-None-Drawer-1/trial_T2", problem=problem
    )


@pytest.mark.parametrize("name", ["train.jsonl.xz", "train.jsonl"])
def test_packed_file_and_folder(tmp_path, game_file, other, name):
    path = write_rows(tmp_path / name, [game_file.to_fields(), other.to_fields()])
    write_rows(tmp_path / "valid_seen.jsonl.xz", [other.to_fields()])
    assert load_games(path) == [game_file, other]
    assert load_games(tmp_path, split="train") == [game_file, other]
    assert load_games(str(tmp_path), split="valid_seen") == [other]
    assert load_games(tmp_path) == [game_file, other, other]


def test_filters(tmp_path, game_file, other):
    path = write_rows(tmp_path / "a.jsonl", [game_file.to_fields(), other.to_fields()])
    assert load_games(path, task_types=["pick_and_place_simple"]) == [other]
    assert load_games(path, max_receptacles=6) == [game_file, other]
    assert load_games(path, max_receptacles=5) == [other]
    with pytest.raises(DataError, match=r"no game is left of 2 read .*Widen the filters"):
        load_games(path, max_receptacles=4)
    with pytest.raises(DataError, match=r"\['pick_up'\]; expected some of pick_and_place_simple"):
        load_games(path, task_types=["pick_up"])
    with pytest.raises(DataError, match="nothing"):
        load_games(path, task_types=[])


def test_rows_are_read_lazily(tmp_path, game_file):
    path = write_rows(tmp_path / "a.jsonl", [game_file.to_fields(), "{broken"])
    games = iter_games(path)
    assert next(games) == game_file
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: not JSON"):
        next(games)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": "(define (problem x) (:objects a - b) (:init (p a)))"}, "no goal"),
        ({"problem": "(define (problem x) (:objects a - b) (:init (p a)) (:goal (p a))"}, "unbal"),
        ({"problem": ""}, "0 top-level items"),
        ({"problem": 3}, "'problem' is a int"),
        ({"solvable": False}, "marked unsolvable"),
        ({"solvable": None}, "'solvable' is a NoneType"),
        ({"walkthrough": None}, "'walkthrough' is a NoneType"),
    ],
)
def test_bad_row_is_an_error_that_names_it(tmp_path, game_file, change, message):
    rows = [game_file.to_fields(), {**game_file.to_fields(), **change}]
    path = write_rows(tmp_path / "train.jsonl.xz", rows)
    with pytest.raises(DataError, match=message) as error:
        load_games(tmp_path, split="train")
    assert f"{path}, row 2" in str(error.value)


@pytest.mark.parametrize("row", ["not json", "[1]", '"text"'])
def test_row_that_is_no_object_is_an_error(tmp_path, row):
    with pytest.raises(DataError, match=r"row 1: .*expected one JSON object a game"):
        load_games(write_rows(tmp_path / "a.jsonl", [row]))


def test_unsolvable_games_are_left_out_on_request(tmp_path, game_file, other):
    rows = [{**game_file.to_fields(), "solvable": False}, other.to_fields()]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert load_games(path, skip_unsolvable=True) == [other]


def test_truncated_damaged_or_empty_xz_is_an_error(tmp_path, game_file):
    path = write_rows(tmp_path / "a.jsonl.xz", [game_file.to_fields()])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated or damaged"):
        load_games(path)
    path.write_bytes(b"no xz at all")
    with pytest.raises(DataError, match="truncated or damaged"):
        load_games(path)
    path.write_bytes(lzma.compress(b"\n"))
    with pytest.raises(DataError, match="empty"):
        load_games(path)
    path.write_bytes(lzma.compress(b"\xff\xfe"))
    with pytest.raises(DataError, match="UTF-8"):
        load_games(path)


def test_missing_or_unknown_path_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load_games(tmp_path / "games")
    with pytest.raises(DataError, match=r"no game\.tw-pddl and no packed file"):
        load_games(tmp_path)
    with pytest.raises(DataError, match=r"no split 'train'; the folder holds nothing"):
        load_games(tmp_path, split="train")
    (tmp_path / "games.txt").write_text("x")
    with pytest.raises(DataError, match="says nothing about the format"):
        load_games(tmp_path / "games.txt")
    with pytest.raises(DataError, match=r"holds \['games.txt'\]"):
        load_games(tmp_path, split="train")


def test_official_tree(write_tree, game_file):
    root = write_tree("train")
    write_tree("valid_seen")
    for path, split in [
        (root, "train"),
        (root / "json_2.1.1", "train"),
        (root / "json_2.1.1" / "train", "train"),
        (root / "json_2.1.1" / "train", None),
    ]:
        assert load_games(path, split=split) == [game_file]
    assert len(load_games(root)) == 2
    [file] = (root / "json_2.1.1" / "train").rglob("game.tw-pddl")
    assert load_games(file) == [game_file]


def test_tree_leaves_movable_and_sliced_tasks_out(write_tree, game_file):
    root = write_tree(
        "train", "pick_and_place_with_movable_recep-Mug-Plate-Shelf-1", solvable=False
    )
    with pytest.raises(DataError, match=r"no game\.tw-pddl"):
        load_games(root, split="train")
    write_tree("train", "pick_and_place_simple-AppleSliced-None-Fridge-1", solvable=False)
    write_tree("train")
    assert load_games(root, split="train") == [game_file]


def test_tree_game_without_a_recorded_walkthrough(write_tree):
    [game] = load_games(write_tree(walkthrough=None))
    assert game.walkthrough == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solvable": False}, "marked unsolvable"),
        ({"solvable": None}, "'solvable' is missing"),
        ({"pddl_problem": None}, "'pddl_problem' is missing"),
        ({"pddl_problem": "(define (problem x) (:objects a) (:init (p a)))"}, "no goal"),
        ({"pddl_domain": "(define (domain alfred))"}, "pddl_domain"),
        ({"pddl_domain": "(define"}, "unbalanced"),
        ({"grammar": "x"}, "grammar"),
    ],
)
def test_bad_tree_game_is_an_error_that_names_the_file(write_tree, changes, message):
    root = write_tree("train", **changes)
    with pytest.raises(DataError, match=message) as error:
        load_games(root, split="train")
    assert "trial_T1/game.tw-pddl" in str(error.value)


def test_tree_file_that_is_not_json_is_an_error(write_tree):
    root = write_tree("train")
    [file] = root.rglob("game.tw-pddl")
    file.write_text(file.read_text()[:1000])
    with pytest.raises(DataError, match=r"game\.tw-pddl: not JSON"):
        load_games(root, split="train")


def test_split_in_two_folders_is_an_error(write_tree):
    root = write_tree("train")
    (root / "json_2.1.2" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="in several folders"):
        load_games(root, split="train")
