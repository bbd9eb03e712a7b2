"""Recorded trajectories come back as they were, whatever is in them."""

import gzip
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_spear.errors import DataError
from megatron_spear.testing.hostile_texts import hostile_text
from megatron_spear.tracking.recorded import (
    RecordedReplay,
    RecordedReward,
    RecordedStep,
    RecordedTrajectory,
    RecordedTurn,
)
from megatron_spear.tracking.recorded_files import (
    drop_steps_after,
    list_steps,
    read_step,
    step_file,
    write_step,
)
from megatron_spear.types import ToolCall, VersionSpan

REWARD = RecordedReward(outcome=1.0, intrinsic=0.3, format=-0.1, total=1.05, parts={"won": 1.0})
TURN = RecordedTurn(
    segment=0,
    observation="You see a desk 1.",
    num_observation_tokens=12,
    text=" go to desk 1<|im_end|>",
    action="go to desk 1",
    tokens=(" go", " to", " desk 1", "<|im_end|>"),
    rollout_logprobs=(-0.1, -0.0, -1.25, None),
    old_logprobs=(-0.1, -0.0, -1.2, -0.0001),
    advantages=(0.5, 0.5, 0.5, 0.5),
    versions=(VersionSpan(10, 1), VersionSpan(11, 3)),
    tool_calls=(ToolCall(name="act", arguments="go to desk 1", succeeded=True),),
    finish_reason="stop",
    time_s=0.25,
    valid=True,
    void=False,
)
WON = RecordedTrajectory(
    group="0.12/game-7",
    member=0,
    prompt_id="game-7",
    kind="look",
    env="alfworld",
    status="completed",
    won=True,
    env_reward=1.0,
    reward=REWARD,
    group_mean=0.25,
    left_out="",
    segment_marks=(("void", "overlong"), ()),
    trained=True,
    stored=True,
    error="",
    prompt="<|system|>You are ...",
    turns=(TURN, replace(TURN, segment=1, old_logprobs=None, advantages=None)),
)
FAILED = replace(
    WON,
    member=1,
    status="failed_engine",
    won=False,
    env_reward=None,
    reward=None,
    group_mean=None,
    segment_marks=(),
    trained=False,
    stored=False,
    error="EngineError: gone",
    turns=(),
)
REPLAYED = RecordedReplay(
    group="0.9/game-3",
    member=2,
    prompt_id="game-3",
    step=9,
    policy_version=8,
    age=3,
    reward=REWARD,
    stored_advantage=0.75,
    advantage=0.5,
    baseline=0.5,
    weight=0.4,
    segments=(0, 1),
    num_tokens=40,
    num_tool_calls=5,
    old_logprob_mean=-0.3,
    rollout_logprob_mean=-0.31,
    ratio_mean=1.01,
)
STEP = RecordedStep(
    step=12,
    policy_version=11,
    intrinsic_weight=0.5,
    replay_weight=0.4,
    num_groups=8,
    num_trajectories=64,
    trajectories=(WON, FAILED),
    replayed=(REPLAYED, replace(REPLAYED, step=None, baseline=None)),
)


def test_a_step_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write_step(tmp_path, STEP)
    assert path.name == "step-00000012.jsonl.gz"
    assert read_step(tmp_path, 12) == STEP
    assert WON.id == "0.12/game-7/0" and REPLAYED.id == "0.9/game-3/2"
    assert WON.marks == ("overlong", "void")


def test_the_same_records_are_the_same_bytes_and_take_the_place_of_others(tmp_path: Path) -> None:
    write_step(tmp_path, replace(STEP, trajectories=()))
    first = write_step(tmp_path, STEP).read_bytes()
    assert write_step(tmp_path, STEP).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012.jsonl.gz"]


def test_each_record_is_one_line_of_plain_json(tmp_path: Path) -> None:
    text = gzip.decompress(write_step(tmp_path, STEP).read_bytes()).decode()
    head, *records = [json.loads(line) for line in text.splitlines()]
    assert head["format"] == 1 and head["step"] == 12
    assert [next(iter(record)) for record in records] == ["trajectory"] * 2 + ["replayed"] * 2
    turn = records[0]["trajectory"]["turns"][0]
    assert turn["versions"] == [[10, 1], [11, 3]]
    assert "text" not in turn, "what the tokens make up is not written twice"


def test_any_text_survives(tmp_path: Path) -> None:
    # Two halves of a surrogate pair side by side are one character in JSON, as it has to be.
    texts = [json.loads(json.dumps(hostile_text(number))) for number in range(300)]
    turns = tuple(
        replace(
            TURN,
            observation=text,
            text=text,
            tokens=(text[:1], text[1:]),
            tool_calls=(ToolCall(name=text, arguments=text, succeeded=False),),
        )
        for text in texts
    )
    step = replace(STEP, trajectories=(replace(WON, prompt=texts[0], error=texts[1], turns=turns),))
    write_step(tmp_path, step)
    assert read_step(tmp_path, 12) == step


def test_a_text_that_tokens_do_not_make_up_is_kept(tmp_path: Path) -> None:
    turn = replace(TURN, text="🦆", tokens=("\ufffd", "\ufffd"))
    step = replace(STEP, trajectories=(replace(WON, turns=(turn,)),))
    write_step(tmp_path, step)
    assert read_step(tmp_path, 12).trajectories[0].turns[0].text == "🦆"


def test_steps_are_listed_in_order_and_dropped_after_one(tmp_path: Path) -> None:
    assert list_steps(tmp_path / "none") == [] and drop_steps_after(tmp_path / "none", 0) == 0
    for step in (100_000_000, 3, 1, 2):
        write_step(tmp_path, replace(STEP, step=step))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-00000004.jsonl.gz.tmp").write_bytes(b"half")
    assert list_steps(tmp_path) == [1, 2, 3, 100_000_000]
    assert drop_steps_after(tmp_path, 2) == 3
    assert list_steps(tmp_path) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "notes.txt"


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_step(tmp_path, replace(STEP, intrinsic_weight=float("nan")))
    assert list_steps(tmp_path) == []


def _lines(*records: object) -> bytes:
    return gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())


HEAD = {
    "format": 1,
    "step": 12,
    "policy_version": 11,
    "intrinsic_weight": 0.5,
    "replay_weight": 0.4,
    "num_groups": 8,
    "num_trajectories": 64,
}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "expected recorded trajectories of format 1"),
        (b"not gzip at all", "BadGzipFile"),
        (_lines(HEAD)[:-9], "EOFError"),
        (gzip.compress(b"{half"), "JSONDecodeError"),
        (_lines({**HEAD, "format": 2}), "format 2"),
        (_lines({**HEAD, "mood": "good"}), "a record with mood, which a later version may know"),
        (_lines({key: HEAD[key] for key in ("format", "step")}), "without intrinsic_weight, num_"),
        (_lines(HEAD, {"trajectory": {"group": "g"}}), "KeyError"),
        (_lines(HEAD, ["trajectory"]), "TypeError"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    step_file(tmp_path, 12).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_step(tmp_path, 12)
    assert "step-00000012.jsonl.gz: got " in str(error.value) and told in str(error.value)


def test_a_step_that_is_not_recorded_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_step(tmp_path, 3)


def test_the_page_shows_every_field() -> None:
    page = (Path(__file__).parents[3] / "docs" / "run-directory.md").read_text()
    shown = set(re.findall(r'"(\w+)":', page))
    for kind in (RecordedStep, RecordedTrajectory, RecordedTurn, RecordedReplay, RecordedReward):
        lists = {"text", "trajectories", "replayed"}  # left out where tokens make it up; lines
        assert {field.name for field in fields(kind)} - lists <= shown, kind


def test_the_reader_needs_no_torch() -> None:
    code = "import sys, megatron_spear.tracking.recorded_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
