"""``evaluate`` from end to end: an unlearned tiny model on three generated games, two attempts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import QUICKSTART, TINY

from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig

pytestmark = pytest.mark.timeout(300)

KINDS = ("look_at_obj_in_light", "pick_and_place_simple")
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """The tiny model as it is made, which knows nothing."""
    from megatron_spear.envs.family import family_of
    from megatron_spear.trainer.models import initial_model

    config = load_config(QUICKSTART, [*TINY, f"model.cache_dir={folder / 'cache'}"])
    return initial_model(config.model, family_of(config.env))


@pytest.fixture(scope="module")
def games(folder: Path) -> Path:
    """A file of three generated games, two of one kind."""
    from megatron_spear.envs.alfworld.task import fresh_game

    size = RunConfig().env.generator
    made = [fresh_game(11, i, (KINDS[i % 2],), size) for i in range(3)]
    path = folder / "three.jsonl"
    path.write_text("".join(json.dumps(game.to_fields()) + "\n" for game in made))
    return path


@pytest.fixture(scope="module")
def played(folder: Path, model: Path, games: Path, command: Command) -> tuple[Path, Any]:
    """The results of two attempts at each game, and what the command said."""
    out = folder / "results"
    done = command(
        "evaluate", str(model), "--env", "alfworld", "--panel", str(games), "-n", "2",
        "--top-p", "0.9", "--out", str(out), "env.max_turns=3", "run.threads=1",
    )  # fmt: skip
    return out, done


def test_the_result_has_all_numbers(played: tuple[Path, Any], games: Path) -> None:
    result = json.loads((played[0] / "evaluation.json").read_text())
    assert result["attempts"] == 2 and list(result["pass_at_k"]) == ["1", "2"]
    assert result["mean_at_n"] == {"value": 0.0, "low": 0.0, "high": 0.0, "prompts": 3}
    assert list(result["by_kind"]) == list(KINDS)
    assert [told["prompts"] for told in result["by_kind"].values()] == [2, 1]
    ids = sorted(json.loads(line)["id"] for line in games.read_text().splitlines())
    assert [prompt["prompt_id"] for prompt in result["prompts"]] == ids
    assert result["trajectories"] | {"action_tokens_mean": 0, "invalid_turn_fraction": 0} == {
        "played": 6, "turns_mean": 3.0, "action_tokens_mean": 0, "invalid_turn_fraction": 0,
        "void_turn_fraction": 0.0, "truncated_fraction": 1.0, "failed": 0,
    }  # fmt: skip
    assert result["panel"]["prompts"] == 3 and len(result["panel"]["sha256"]) == 64
    settings = result["settings"]
    assert (settings["evaluation"]["top_p"], settings["env"]["max_turns"]) == (0.9, 3)


def test_every_attempt_is_written_down(played: tuple[Path, Any]) -> None:
    lines = (played[0] / "trajectories.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["attempt"] for record in records] == [0, 1] * 3
    for record in records:
        assert record["won"] is False and record["score"] == 0.0 and len(record["turns"]) == 3
        first = record["turns"][0]
        assert "Your task is to: " in first["observation"] and first["action_tokens"] > 0
        assert first["tool_calls"][0]["arguments"] == first["action"]
        assert all(turn["observation"] for turn in record["turns"])
    texts = [[turn["text"] for turn in record["turns"]] for record in records]
    assert texts[0] != texts[1], "the attempts draw apart"


def test_the_table_is_shown(played: tuple[Path, Any]) -> None:
    out, done = played
    for shown in ("mean@2", "pass@1", "pass@2", *KINDS, "0.000 to 0.000", "invalid turns"):
        assert shown in done.out
    assert str(out / "evaluation.json") in done.out


def test_the_same_model_and_panel_give_the_same_attempts(
    played: tuple[Path, Any], model: Path, games: Path, command: Command, tmp_path: Path
) -> None:
    """And the first attempt of two is the only one of one."""
    again = tmp_path / "again"
    command(
        "evaluate", str(model), "--env=alfworld", f"--panel={games}", "--top-p=0.9",
        f"--out={again}", "env.max_turns=3", "run.threads=1",
    )  # fmt: skip
    before, after = (
        [json.loads(line) for line in (path / "trajectories.jsonl").read_text().splitlines()]
        for path in (played[0], again)
    )
    assert after == before[::2]


def test_a_server_plays_the_same_attempts(
    played: tuple[Path, Any], model: Path, games: Path, command: Command, tmp_path: Path
) -> None:
    """It is given the model's weights, and draws with the same seeds and top_p."""
    from megatron_spear.testing.serve import serve_in_process

    out = tmp_path / "served"
    with serve_in_process(model, "--max-context", 512) as served:
        command(
            "evaluate", str(model), "--env=alfworld", f"--panel={games}", "-n", "2", "--top-p=0.9",
            f"--out={out}", "env.max_turns=3", "run.threads=1", "rollout.engine=sglang",
            f"rollout.servers=[{served.url}]",
        )  # fmt: skip
    before, after = (path / "trajectories.jsonl" for path in (played[0], out))
    assert after.read_text() == before.read_text()


def test_results_in_the_way_are_kept(
    played: tuple[Path, Any], model: Path, games: Path, command: Command
) -> None:
    out, _ = played
    before = (out / "evaluation.json").read_bytes()
    options = ("--env", "alfworld", "--panel", str(games))
    done = command("evaluate", str(model), *options, "--out", str(out), status=2)
    assert f"--out {out}: is there already" in done.err
    assert (out / "evaluation.json").read_bytes() == before


def test_what_is_no_checkpoint(model: Path, command: Command, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    done = command("evaluate", absent, "--env", "alfworld", status=2)
    assert f"error: {absent}: no such folder" in done.err
    (tmp_path / "config.yaml").write_text("run: {steps: 3}\n")
    done = command("evaluate", str(tmp_path), status=2)
    assert "has no exported model" in done.err
    done = command("evaluate", str(model), status=2)
    assert "nothing says what to play" in done.err
    assert not list(model.parent.glob("*-evaluation"))
