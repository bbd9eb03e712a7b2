"""The record of consumed prompts: each once, also after a resume."""

import logging
from pathlib import Path

import pytest

from megatron_spear.trainer.consumption import ConsumptionLog, read_consumed
from megatron_spear.types import ConsumedPrompt, Fate


def _prompt(position: int, fate: Fate = Fate.TRAINED) -> ConsumedPrompt:
    return ConsumedPrompt(position=position, prompt_id=f"game-{position}", fate=fate)


def _written(path: Path) -> ConsumptionLog:
    consumption = ConsumptionLog(path)
    consumption.log(1, [_prompt(0), _prompt(1, Fate.FAILED)])
    consumption.log(2, [_prompt(2, Fate.FILTERED)])
    return consumption


def test_a_line_says_what_became_of_a_prompt(tmp_path: Path) -> None:
    _written(tmp_path / "consumed.jsonl").close()
    assert read_consumed(tmp_path / "consumed.jsonl") == [
        {"step": 1, "position": 0, "prompt_id": "game-0", "fate": "trained"},
        {"step": 1, "position": 1, "prompt_id": "game-1", "fate": "failed"},
        {"step": 2, "position": 2, "prompt_id": "game-2", "fate": "filtered"},
    ]


def test_a_resumed_run_writes_each_prompt_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "consumed.jsonl"
    _written(path)  # a kill closes nothing
    with path.open("a") as file:
        file.write('{"step": 3, "posi')
    resumed = ConsumptionLog(path, resumed=(1, 2))
    resumed.log(2, [_prompt(2)])
    resumed.close()
    assert [line["position"] for line in read_consumed(path)] == [0, 1, 2]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_log_that_somebody_changed_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "consumed.jsonl"
    _written(path).close()
    ConsumptionLog(path, resumed=(2, 4)).close()
    assert "names 3 prompts up to step 2, expected 4" in caplog.text
