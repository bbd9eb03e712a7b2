"""The two files of an evaluation and its table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_spear.testing.hand_made import make_trajectory, make_turn
from megatron_spear.trainer.evaluation_report import (
    table_rows,
    trajectory_record,
    trajectory_records,
    write_report,
)
from megatron_spear.trainer.evaluation_stats import statistics
from megatron_spear.types import Prompt, Status, TrajectoryGroup

PROMPT = Prompt(
    prompt_id="p",
    env="toy",
    kind="pick",
    messages=({"role": "system", "content": "Play."},),
)
LOOK = make_turn("look", observation="A room.")
FLY = make_turn("fly \ud800\x00", valid=False, void=True, observation="A mug.")
WON = replace(make_trajectory("p", 1, [[LOOK], [FLY]], won=True), prompt=PROMPT, env_reward=1.0)
FAILED = replace(
    make_trajectory("p", 0, (), status=Status.FAILED_TOOL),
    prompt=PROMPT,
    info={"error": "EnvironmentFault: gone"},
)
GROUPS = [TrajectoryGroup(group_id="g", prompt=PROMPT, members=(WON,), failures=(FAILED,))]


def result() -> dict[str, Any]:
    panel = {"sha256": "ab" * 32, "prompts": 1}
    return {"panel": panel, **statistics(GROUPS, attempts=2, seed=0)}


def test_an_attempt_as_plain_values() -> None:
    assert trajectory_record(WON) == {
        "prompt_id": "p",
        "kind": "pick",
        "attempt": 1,
        "status": "completed",
        "won": True,
        "score": 1.0,
        "messages": [{"role": "system", "content": "Play."}],
        "turns": [
            {
                "observation": "A room.",
                "text": "look",
                "action": "look",
                "valid": True,
                "void": False,
                "finish_reason": "stop",
                "action_tokens": 2,
                "tool_calls": [{"name": "act", "arguments": "look", "succeeded": True}],
            },
            {
                "observation": "A mug.",
                "text": "fly \ud800\x00",
                "action": "fly \ud800\x00",
                "valid": False,
                "void": True,
                "finish_reason": "stop",
                "action_tokens": 2,
                "tool_calls": [{"name": "act", "arguments": "fly \ud800\x00", "succeeded": False}],
            },
        ],
        "info": {},
    }


def test_a_failed_attempt_has_neither_result_nor_score() -> None:
    first, second = trajectory_records(GROUPS)
    assert (first["attempt"], first["won"], first["score"]) == (0, None, None)
    assert first["status"] == "failed_tool" and "gone" in first["info"]["error"]
    assert (second["attempt"], second["won"]) == (1, True)


def test_both_files_can_be_read_back_whatever_the_model_wrote(tmp_path: Path) -> None:
    write_report(tmp_path, result(), GROUPS)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(
        json.dumps(result())
    )
    lines = (tmp_path / "trajectories.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(trajectory_records(GROUPS))
    assert {file.name for file in tmp_path.iterdir()} == {"evaluation.json", "trajectories.jsonl"}


def test_the_table_says_what_is_not_known() -> None:
    rows = {name.strip(): (value, interval) for name, value, interval in table_rows(result())}
    assert rows["mean@2"] == rows["pass@1"] == rows["pick"] == ("1.000", "")
    assert rows["pass@2"] == ("unknown", "")
    assert rows["failed (in no number)"] == ("1", "") and rows["invalid turns"] == ("0.500", "")
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "prompts": 8}
    told = table_rows({**result(), "mean_at_n": estimate})
    assert told[0] == ("mean@2", "0.500", "0.250 to 0.750")
