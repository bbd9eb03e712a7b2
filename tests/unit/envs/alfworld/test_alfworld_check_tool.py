"""The transcript checker: its summary line, its exit status and its errors."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.game import Game, GameState
from megatron_spear.envs.alfworld.text import intro

TOOL = Path(__file__).parents[4] / "tools" / "check_alfworld.py"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("check_alfworld", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MIN_TIMED_S", 0.01)
    return module


@pytest.fixture
def recorded(game_file):
    """A transcript in the recorded form, made by the engine itself."""
    state = GameState(Game(game_file))
    entries = []
    for action in [None, *game_file.walkthrough, "dance"]:
        feedback = intro(state) if action is None else act(state, action).feedback
        actions = admissible_actions(state)
        entries.append(
            {"action": action, "feedback": feedback, "admissible": actions, "won": state.won}
        )
    return {"id": game_file.id, "transcript": entries}


@pytest.fixture
def run(tool, tmp_path, game_file, domain, grammar, capsys):
    def run_tool(rows, **texts):
        games, transcripts = tmp_path / "games.jsonl", tmp_path / "transcripts.jsonl"
        games.write_text(json.dumps(game_file.to_fields()) + "\n")
        transcripts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["--games", str(games), "--transcripts", str(transcripts)]
        for name, text in {"domain": domain, "grammar": grammar, **texts}.items():
            (tmp_path / name).write_text(text)
            arguments += [f"--{name}", str(tmp_path / name)]
        status = tool.main(arguments)
        return status, capsys.readouterr()

    return run_tool


def test_equal_play_passes(run, recorded):
    status, output = run([recorded])
    assert status == 0
    assert re.fullmatch(
        r"alfworld: 8 matched, 8 total, [1-9]\d* steps/s", output.out.splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("name", "value"), [("feedback", "Hm."), ("admissible", ["look"]), ("won", True)]
)
def test_a_difference_is_shown_and_fails(run, recorded, name, value):
    recorded["transcript"][2][name] = value
    status, output = run([recorded])
    assert status == 1
    assert f"  {name}: got " in output.out and "entry 2" in output.out
    assert output.out.splitlines()[-1].startswith("alfworld: 7 matched, 8 total, ")


def test_a_missing_game_counts_as_not_matched(run, recorded):
    status, output = run([recorded, {**recorded, "id": "other"}])
    assert status == 1
    assert "other: not among the games" in output.out
    assert output.out.splitlines()[-1].startswith("alfworld: 8 matched, 16 total, ")


def test_no_transcript_fails(run):
    status, output = run([])
    assert status == 1
    assert output.out.splitlines()[-1].startswith("alfworld: 0 matched, 0 total, ")


def test_another_domain_or_grammar_is_an_error(run, recorded, domain, grammar):
    status, output = run([recorded], domain=domain.replace("SliceObject", "CutObject"))
    assert status == 2 and "action cutobject" in output.err
    status, output = run([recorded], grammar=grammar.replace("You close", "You shut"))
    assert status == 2 and "CloseObject.feedback" in output.err


@pytest.mark.parametrize("row", [[1], {"id": "x"}, {"id": "x", "transcript": "look"}])
def test_malformed_transcripts_are_an_error(run, row):
    status, output = run([row])
    assert status == 2 and "row 1: expected the fields id and transcript" in output.err
