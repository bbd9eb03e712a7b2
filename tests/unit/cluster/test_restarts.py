"""Whether a run goes on after an attempt."""

from pathlib import Path

import pytest

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.restarts import Judgement, Verdict, judge


def _attempt(run: Path, *, steps: int = 0, stopped: bool = False) -> Attempt:
    """The next attempt, in which checkpoints up to ``steps`` more were written."""
    attempt = Attempt.begin(run)
    for step in range(attempt.begun_at() + 1, attempt.begun_at() + steps + 1):
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
    if stopped:
        attempt.mark_stopped("SIGUSR1", attempt.begun_at() + steps)
    return attempt


def _judge(attempt: Attempt, status: int = 1, max_restarts: int = 3) -> Judgement:
    return judge(attempt, status, max_restarts=max_restarts, trainer_nodes=2)


def test_it_is_done_when_every_trainer_node_says_so(tmp_path: Path) -> None:
    attempt = _attempt(tmp_path)
    attempt.mark_done(0)
    assert _judge(attempt, 0).verdict is Verdict.AGAIN, "one of two"
    attempt.mark_done(1)
    assert _judge(attempt, 0) == Judgement(verdict=Verdict.DONE, reason="the run has ended")
    assert _judge(attempt, 1).verdict is Verdict.AGAIN, "and nobody else failed"


def test_one_that_was_stopped_goes_on_whatever_its_status(tmp_path: Path) -> None:
    for number in range(20):  # stops cost no restart
        judgement = _judge(_attempt(tmp_path, steps=1, stopped=True), number % 2)
        assert judgement.verdict is Verdict.AGAIN
    assert judgement.reason == "it was stopped and has saved step 20 (SIGUSR1)"


def test_crashes_that_lead_somewhere_are_restarted_while_the_budget_lasts(tmp_path: Path) -> None:
    verdicts = [_judge(_attempt(tmp_path, steps=1)) for _ in range(4)]
    assert [v.verdict for v in verdicts] == [Verdict.AGAIN] * 3 + [Verdict.FAILED]
    assert verdicts[2].reason == (
        "it ended with status 1; crash 3 of at most 3, it goes on from step 3"
    )
    assert "crashed 4 times and cluster.max_restarts=3" in verdicts[3].reason


@pytest.mark.parametrize("first_gains", [True, False])
def test_two_crashes_in_a_row_without_a_checkpoint_end_it(
    tmp_path: Path, first_gains: bool
) -> None:
    assert _judge(_attempt(tmp_path, steps=int(first_gains))).verdict is Verdict.AGAIN
    second = _judge(_attempt(tmp_path))
    assert second.verdict is (Verdict.AGAIN if first_gains else Verdict.FAILED)
    if first_gains:
        second = _judge(_attempt(tmp_path))
        assert second.verdict is Verdict.FAILED
    assert "neither wrote a new checkpoint" in second.reason


def test_a_stop_between_two_crashes_parts_them(tmp_path: Path) -> None:
    verdicts = [
        _judge(_attempt(tmp_path)),
        _judge(_attempt(tmp_path, stopped=True)),
        _judge(_attempt(tmp_path)),
    ]
    assert {v.verdict for v in verdicts} == {Verdict.AGAIN}


def test_what_cannot_work_is_not_tried_again(tmp_path: Path) -> None:
    attempt = _attempt(tmp_path, steps=5)
    attempt.refuse("rollout.group_size=1 gives advantage 0 everywhere")
    judgement = _judge(attempt)
    assert judgement.verdict is Verdict.FAILED and "group_size=1" in judgement.reason


def test_no_restart_is_no_restart(tmp_path: Path) -> None:
    assert _judge(_attempt(tmp_path, steps=1), max_restarts=0).verdict is Verdict.FAILED
