"""The simulator of asynchronous rollouts against what can be reckoned by hand."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_spear.cluster.planner.long_tail import LongTail, spread_of
from megatron_spear.cluster.planner.simulator import (
    Workload,
    gain_over_taking_turns,
    simulate,
)

DECODE_S = np.array([0.0, *(0.010 + 0.001 * b for b in range(1, 65))])
EQUAL = LongTail(mean=100, longest=100, spread=0.0)
WORK = Workload(
    num_engines=1,
    decode_s=DECODE_S,
    num_prompts=8,
    group_size=8,
    lengths=EQUAL,
    train_s=3.0,
    update_s=0.5,
)
ROLLOUT_S = 100 * DECODE_S[64]
LONG_TAIL = replace(
    WORK, num_engines=4, num_prompts=32, lengths=LongTail(mean=200, longest=2000, spread=1.0)
)


def test_equal_lengths_and_room_for_all_take_one_wave() -> None:
    simulated = simulate(WORK)
    assert simulated.step_s == pytest.approx(ROLLOUT_S + 3.5)
    assert simulated.trainer_idle == pytest.approx(ROLLOUT_S / (ROLLOUT_S + 3.5))
    assert simulated.engine_idle == pytest.approx(3.5 / (ROLLOUT_S + 3.5))
    assert simulated.occupancy == pytest.approx(ROLLOUT_S / (ROLLOUT_S + 3.5))
    assert simulated.tokens_per_s == pytest.approx(6400 / (ROLLOUT_S + 3.5))
    assert simulated.lag_share == (1.0,)


def test_one_slot_plays_one_after_the_other() -> None:
    simulated = simulate(replace(WORK, decode_s=DECODE_S[:2]))
    assert simulated.step_s == pytest.approx(64 * 100 * DECODE_S[1] + 3.5)


def test_a_set_is_shared_out_over_the_engines() -> None:
    simulated = simulate(replace(WORK, num_engines=4))
    assert simulated.step_s == pytest.approx(100 * DECODE_S[16] + 3.5)


def test_turns_wait_for_their_environment() -> None:
    simulated = simulate(replace(WORK, num_turns=5, env_s=2.0))
    assert simulated.step_s == pytest.approx(ROLLOUT_S + 4 * 2.0 + 3.5)


def test_attempts_beyond_the_most_wait_for_others_to_end() -> None:
    simulated = simulate(replace(WORK, max_attempts=16))
    assert simulated.step_s == pytest.approx(4 * 100 * DECODE_S[16] + 3.5)


def test_full_engines_bind_when_rollouts_run_ahead() -> None:
    simulated = simulate(replace(WORK, max_lag=1))
    assert simulated.step_s == pytest.approx(ROLLOUT_S + 0.5)  # they never wait but for updates
    assert simulated.engine_idle == pytest.approx(0.5 / (ROLLOUT_S + 0.5))
    during_training = 3.0 / DECODE_S[64] / 100
    assert simulated.lag_share == pytest.approx((1 - during_training, during_training))


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_the_trainer_binds_when_it_takes_longer(lag: int) -> None:
    """Then every set is whole before the next version: it is as old as it may be."""
    simulated = simulate(replace(WORK, max_lag=lag, train_s=20.0))
    assert simulated.step_s == pytest.approx(20.5)
    assert simulated.trainer_idle == pytest.approx(0.0)
    assert simulated.lag_share == pytest.approx((0.0,) * lag + (1.0,))


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_deterministic_updates_wait_for_what_was_begun(lag: int) -> None:
    simulated = simulate(replace(LONG_TAIL, max_lag=lag, deterministic=True))
    assert simulated.lag_share[lag] == 1.0  # each set by one version
    alone = simulate(replace(LONG_TAIL, train_s=0.0, update_s=0.0))
    assert simulated.step_s == pytest.approx(alone.step_s + 0.5, rel=0.2)


def test_prompts_are_read_one_after_the_other() -> None:
    simulated = simulate(replace(WORK, read_s=0.02))
    assert simulated.step_s == pytest.approx(ROLLOUT_S + 3.5 + 64 * 0.02)


def test_an_update_reads_what_is_under_way_again() -> None:
    again = simulate(replace(WORK, max_lag=1, reread_s=0.01))
    assert again.step_s == pytest.approx(ROLLOUT_S + 0.5 + 64 * 0.01)


def test_no_token_is_older_than_the_most_lag() -> None:
    for lag in (0, 1, 3):
        simulated = simulate(replace(LONG_TAIL, max_lag=lag))
        assert simulated.max_lag <= lag
        assert sum(simulated.lag_share) == pytest.approx(1.0)


def test_a_long_tail_gains_from_running_ahead() -> None:
    gains = [gain_over_taking_turns(replace(LONG_TAIL, max_lag=lag)) for lag in (0, 1, 4)]
    assert gains[0] == 1.0
    assert gains[0] < gains[1] < gains[2]


def test_the_same_seed_gives_the_same() -> None:
    assert simulate(LONG_TAIL, seed=3) == simulate(LONG_TAIL, seed=3)
    assert simulate(LONG_TAIL, seed=3) != simulate(LONG_TAIL, seed=4)


def test_lengths_have_their_mean_after_the_cut() -> None:
    for lengths in (
        LongTail(mean=795, longest=3996, spread=1.0),
        LongTail(mean=3100, longest=3996, spread=1.0),
        LongTail(mean=50, longest=50, spread=1.0),
    ):
        drawn = lengths.draw(np.random.default_rng(0), 200_000)
        assert drawn.mean() == pytest.approx(lengths.mean, rel=0.01)
        assert drawn.max() <= lengths.longest
        assert lengths.quantiles(4000).mean() == pytest.approx(lengths.mean, rel=0.01)
        assert (drawn**2).mean() == pytest.approx(lengths.mean_square, rel=0.02)


def test_the_spread_of_a_known_quantile() -> None:
    lengths = LongTail(mean=1000, longest=1_000_000, spread=spread_of(1000, 5000))
    assert lengths.quantile(0.99) == pytest.approx(5000, rel=0.01)
