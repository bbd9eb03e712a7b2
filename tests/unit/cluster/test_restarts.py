"""What becomes of a run after an attempt, for each way an attempt can end."""

import json
from pathlib import Path

import pytest

from megatron_spear.cluster.attempt import Attempt, newest_checkpoint
from megatron_spear.cluster.restarts import (
    BAD_NODES_STATUS,
    USAGE_STATUS,
    Judgement,
    Verdict,
    grant_restarts,
    judge,
    judge_lost,
)
from megatron_spear.config.cluster import ClusterSection

TWO_NODES = ClusterSection(trainer_nodes=2)


def _checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step}").mkdir(parents=True)


def _done(attempt: Attempt, nodes: int) -> None:
    for index in range(nodes):
        (attempt.done / f"trainer_{index}").touch()


def _crash(run: Path, *, checkpoint: int | None = None, restarts: int = 10) -> Judgement:
    """One attempt that ends with status 1, after a new checkpoint or without."""
    attempt = Attempt.begin(run)
    if checkpoint is not None:
        _checkpoint(run, checkpoint)
    return judge(attempt, 1, ClusterSection(max_restarts=restarts))


def test_done_needs_a_word_of_every_trainer_node(tmp_path: Path) -> None:
    attempt = Attempt.begin(tmp_path)
    _done(attempt, 1)
    judgement = judge(attempt, 0, TWO_NODES)
    assert judgement.verdict is Verdict.AGAIN
    assert "1 of 2 trainer nodes did not say" in judgement.reason
    _done(attempt, 2)
    assert judge(attempt, 0, TWO_NODES).verdict is Verdict.DONE
    assert judge(attempt, 1, TWO_NODES).verdict is Verdict.AGAIN, "a crash after the last word"


def test_a_stop_goes_on_and_costs_nothing(tmp_path: Path) -> None:
    for _ in range(5):
        attempt = Attempt.begin(tmp_path)
        attempt.mark_stopped("SIGUSR1", 7)
        judgement = judge(attempt, 143, ClusterSection(max_restarts=0))
        assert judgement.verdict is Verdict.AGAIN
        assert judgement.reason == "stopped by SIGUSR1, saved after step 7"


def _stop(run: Path, told: str) -> Judgement:
    attempt = Attempt.begin(run)
    attempt.mark_stopped("SIGUSR1 in the warm start", newest_checkpoint(run))
    return judge(attempt, 0, ClusterSection(max_restarts=0), told)


def test_three_stops_in_a_row_that_got_no_further_end_it(tmp_path: Path) -> None:
    assert [_stop(tmp_path, "USR1").verdict for _ in range(2)] == [Verdict.AGAIN, Verdict.AGAIN]
    failed = _stop(tmp_path, "USR1")
    assert failed.verdict is Verdict.FAILED
    assert "3 stops in a row without a new checkpoint" in failed.reason
    assert "longer than the 85800 s until the job is told to stop" in failed.reason
    assert "raise cluster.slurm.time_limit" in failed.reason
    assert f"megatron-spear sft resume={tmp_path}" in failed.reason
    grant_restarts(tmp_path)
    assert _stop(tmp_path, "USR1").verdict is Verdict.AGAIN, "a launch by the user"


def test_a_new_checkpoint_begins_a_new_row_of_stops(tmp_path: Path) -> None:
    _stop(tmp_path, "USR1")
    _stop(tmp_path, "USR1")
    attempt = Attempt.begin(tmp_path)
    _checkpoint(tmp_path, 1)
    attempt.mark_stopped("SIGUSR1", 1)
    assert judge(attempt, 0, ClusterSection(), "USR1").verdict is Verdict.AGAIN
    assert [_stop(tmp_path, "USR1").verdict for _ in range(2)] == [Verdict.AGAIN, Verdict.AGAIN]
    assert _stop(tmp_path, "USR1").verdict is Verdict.FAILED


@pytest.mark.parametrize("told", ["TERM", "INT", ""])
def test_stops_that_the_time_limit_did_not_ask_for_are_in_no_row(tmp_path: Path, told: str) -> None:
    """Preemption, and a user's own signal."""
    assert {_stop(tmp_path, told).verdict for _ in range(4)} == {Verdict.AGAIN}
    assert [_stop(tmp_path, "USR1").verdict for _ in range(2)] == [Verdict.AGAIN, Verdict.AGAIN]


def test_crashes_spend_the_budget_by_progress(tmp_path: Path) -> None:
    assert _crash(tmp_path, checkpoint=10, restarts=3).verdict is Verdict.AGAIN
    again = _crash(tmp_path, restarts=3)
    assert again.verdict is Verdict.AGAIN
    assert again.reason == (
        "crashed with status 1 at step 10, without a new checkpoint; 3 of 3 restarts spent"
    )
    failed = _crash(tmp_path, checkpoint=20, restarts=3)
    assert failed.verdict is Verdict.FAILED
    assert "4 restarts of cluster.max_restarts=3" in failed.reason


def test_three_crashes_in_a_row_without_progress_end_it(tmp_path: Path) -> None:
    _crash(tmp_path, checkpoint=1, restarts=100)
    for _ in range(2):
        assert _crash(tmp_path, restarts=100).verdict is Verdict.AGAIN
    failed = _crash(tmp_path, restarts=100)
    assert failed.verdict is Verdict.FAILED
    assert "3 crashes in a row without a new checkpoint" in failed.reason


def test_progress_begins_a_new_row_and_bad_nodes_do_not_count_in_it(tmp_path: Path) -> None:
    cluster = ClusterSection(max_restarts=100)
    _crash(tmp_path, restarts=100)
    _crash(tmp_path, restarts=100)
    assert judge(Attempt.begin(tmp_path), BAD_NODES_STATUS, cluster).verdict is Verdict.AGAIN
    attempt = Attempt.begin(tmp_path)
    _checkpoint(tmp_path, 5)
    attempt.mark_stopped("SIGTERM", 5)
    judge(attempt, 0, cluster)
    assert _crash(tmp_path, restarts=100).verdict is Verdict.AGAIN
    assert _crash(tmp_path, restarts=100).verdict is Verdict.AGAIN
    assert _crash(tmp_path, restarts=100).verdict is Verdict.FAILED


def test_bad_nodes_spend_one_restart_each(tmp_path: Path) -> None:
    cluster = ClusterSection(max_restarts=2)
    verdicts = [judge(Attempt.begin(tmp_path), BAD_NODES_STATUS, cluster) for _ in range(3)]
    assert [v.verdict for v in verdicts] == [Verdict.AGAIN, Verdict.AGAIN, Verdict.FAILED]


@pytest.mark.parametrize("status", [USAGE_STATUS, 143])
def test_what_no_restart_mends_fails_at_once(tmp_path: Path, status: int) -> None:
    attempt = Attempt.begin(tmp_path)
    if status != USAGE_STATUS:  # another node's processes were killed, with a higher status
        attempt.mark_hopeless("run.steps: got -1")
    judgement = judge(attempt, status, ClusterSection())
    assert judgement.verdict is Verdict.FAILED
    assert ("run.steps: got -1" in judgement.reason) is (status != USAGE_STATUS)


def test_a_launch_by_the_user_begins_with_the_whole_budget(tmp_path: Path) -> None:
    _crash(tmp_path, restarts=2)
    assert _crash(tmp_path, restarts=2).verdict is Verdict.FAILED
    grant_restarts(tmp_path)
    assert _crash(tmp_path, restarts=2).verdict is Verdict.AGAIN
    assert _crash(tmp_path, restarts=2).verdict is Verdict.FAILED


def test_an_attempt_that_nobody_saw_end_counts_as_a_crash(tmp_path: Path) -> None:
    cluster = ClusterSection(max_restarts=2)
    assert judge_lost(tmp_path, cluster) is None, "there was none before"
    Attempt.begin(tmp_path)
    judgement = judge_lost(tmp_path, cluster)
    assert judgement is not None and judgement.verdict is Verdict.AGAIN
    assert "ended unseen" in judgement.reason
    assert judge_lost(tmp_path, cluster) is None, "it is judged once"
    Attempt.begin(tmp_path)
    judgement = judge_lost(tmp_path, cluster)
    assert judgement is not None and judgement.verdict is Verdict.FAILED


def test_a_lost_attempt_of_an_earlier_launch_is_not_judged(tmp_path: Path) -> None:
    Attempt.begin(tmp_path)
    grant_restarts(tmp_path)
    assert judge_lost(tmp_path, ClusterSection(max_restarts=0)) is None


def test_judging_again_replaces_the_judgement(tmp_path: Path) -> None:
    attempt = Attempt.begin(tmp_path)
    for _ in range(3):
        judgement = judge(attempt, 1, ClusterSection(max_restarts=2))
    assert judgement.verdict is Verdict.AGAIN
    assert json.loads(attempt.ended_file.read_text())["cost"] == 2


def test_a_broken_record_is_passed_over(tmp_path: Path) -> None:
    attempt = Attempt.begin(tmp_path)
    judge(attempt, 1, ClusterSection())
    attempt.ended_file.write_text("{")
    assert "2 of 10" in _crash(tmp_path).reason


def test_only_committed_checkpoints_count_as_progress(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == 0
    for name in ("step_3", "step_12", "step_20.tmp", "step_30.trash", "step_40.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 12
