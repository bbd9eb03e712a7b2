"""The record of the panel's games, written twice after a kill and read once."""

from pathlib import Path

from megatron_spear.tracking.evaluations import EvaluationLog, PanelRecord, read_evaluations


def test_what_is_written_is_read(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path / "evaluations.jsonl")
    log.log(0, "ab", (1.0, 0.0, None))
    log.log(20, "ab", (0.5, None, None))
    log.close()
    first, second = read_evaluations(tmp_path / "evaluations.jsonl")
    assert first == PanelRecord(step=0, panel_sha256="ab", won=(1.0, 0.0, None))
    assert (first.success, second.step, second.success) == (0.5, 20, 0.5)
    assert PanelRecord(step=1, panel_sha256="", won=(None,)).success is None


def test_a_resumed_run_repeats_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    log = EvaluationLog(path)
    for step in (0, 10, 20):
        log.log(step, "ab", (0.0,))
    log.close()
    with path.open("a") as file:
        file.write('{"step": 30, "eval/w')  # a kill
    again = EvaluationLog(path, resumed_step=10)  # the evaluation of step 10 comes after its save
    assert [record.step for record in read_evaluations(path)] == [0]
    again.log(10, "ab", (1.0,))
    again.close()
    assert [(record.step, record.won) for record in read_evaluations(path)] == [
        (0, (0.0,)),
        (10, (1.0,)),
    ]
