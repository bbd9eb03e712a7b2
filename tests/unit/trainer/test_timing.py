"""The phase timer, with a clock that is moved by hand."""

import pytest

from megatron_spear.trainer.timing import PhaseTimer


class _Clock:
    """Stands for the ``time`` module."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr("megatron_spear.trainer.timing.time", made)
    return made


def test_phases_add_up_by_hand(clock: _Clock) -> None:
    timer = PhaseTimer()
    for name, seconds in (("rollout", 3.0), ("rollout", 1.0), ("replay", 0.5), ("train", 2.0)):
        with timer.phase(name):
            clock.now += seconds
    clock.now += 1.5
    assert timer.metrics() == {
        "time/rollout_s": 4.0,
        "time/replay_s": 0.5,
        "time/train_s": 2.0,
        "time/step_s": 8.0,
        "time/other_fraction": 0.25,
    }


def test_a_phase_that_raises_is_timed_too(clock: _Clock) -> None:
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer.phase("train"):
        clock.now += 2.0
        raise KeyError
    assert timer.metrics()["time/train_s"] == 2.0


def test_no_time_at_all_is_no_division(clock: _Clock) -> None:
    assert PhaseTimer().metrics() == {"time/step_s": 0.0, "time/other_fraction": 0.0}
