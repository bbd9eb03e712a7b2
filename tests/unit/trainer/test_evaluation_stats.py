"""mean@n, pass@k and their intervals against numbers worked out by hand."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from megatron_spear.testing.hand_made import make_trajectory, make_turn
from megatron_spear.trainer import evaluation_stats
from megatron_spear.trainer.evaluation_stats import (
    Estimate,
    PlayedPrompt,
    bootstrap_interval,
    ks_of,
    mean_at_n,
    pass_at_k,
    pass_estimate,
    statistics,
    trajectory_means,
)
from megatron_spear.types import Prompt, Status, Trajectory, TrajectoryGroup


def played(won: str, failed: int = 0, kind: str = "") -> PlayedPrompt:
    """``played("1001")``: four attempts, the first and the last won."""
    wins = tuple(letter == "1" for letter in won)
    return PlayedPrompt(
        prompt_id=won, kind=kind, won=wins, scores=tuple(map(float, wins)), failed=failed
    )


def group(name: str, kind: str, *members: Trajectory) -> TrajectoryGroup:
    prompt = Prompt(prompt_id=name, env="toy", kind=kind)
    good = tuple(m for m in members if not m.status.failed)
    bad = tuple(m for m in members if m.status.failed)
    return TrajectoryGroup(group_id=name, prompt=prompt, members=good, failures=bad)


@pytest.mark.parametrize("num_attempts", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_win(num_attempts: int) -> None:
    for num_won in range(num_attempts + 1):
        attempts = [i < num_won for i in range(num_attempts)]
        for k in range(1, num_attempts + 1):
            subsets = [any(chosen) for chosen in combinations(attempts, k)]
            expected = sum(subsets) / len(subsets)
            assert pass_at_k(num_attempts, num_won, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_of_many_attempts() -> None:
    assert pass_at_k(4096, 1, 1024) == pytest.approx(0.25)
    assert pass_at_k(4096, 0, 4096) == 0.0 and pass_at_k(4096, 4096, 1) == 1.0


@pytest.mark.parametrize(
    ("num_attempts", "ks"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (6, (1, 2, 4, 6)),
        (32, (1, 2, 4, 8, 16, 32)),
        (33, (1, 2, 4, 8, 16, 32, 33)),
    ],
)
def test_powers_of_two_and_all(num_attempts: int, ks: tuple[int, ...]) -> None:
    assert ks_of(num_attempts) == ks


def test_a_prompt_counts_once_whatever_failed() -> None:
    """Shares 1/2, 0 and 1: mean 1/2. The prompt with one attempt left enters pass@1 alone."""
    prompts = [played("10"), played("00"), played("1", failed=1), played("", failed=2)]
    assert mean_at_n(prompts, 0).value == 0.5 and mean_at_n(prompts, 0).prompts == 3
    one, two = pass_estimate(prompts, 1, 0), pass_estimate(prompts, 2, 0)
    assert one == mean_at_n(prompts, 0)
    assert (two.value, two.prompts) == (0.5, 2)
    nothing = pass_estimate(prompts, 3, 0)
    assert nothing == Estimate(value=None, low=None, high=None, prompts=0)


def test_intervals_by_hand() -> None:
    # Two prompts: the mean of a draw is 0, 1/2, 1 with chance 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], 0) == (0.0, 1.0)
    # One of four: 0 ones in 31.6 % of draws, at most 2 in 94.9 %, at most 3 in 99.6 %.
    assert bootstrap_interval([0.0, 0.0, 0.0, 1.0], 0) == (0.0, 0.75)
    # Half of a hundred: the binomial's 2.5 % and 97.5 % quantiles are 40 and 60.
    assert bootstrap_interval([0.0, 1.0] * 50, 0) == (0.4, 0.6)
    assert bootstrap_interval([0.3] * 5, 0) == pytest.approx((0.3, 0.3))
    assert bootstrap_interval([1.0], 0) is None and bootstrap_interval([], 0) is None


def test_an_interval_depends_on_values_and_seed_alone() -> None:
    values = [i % 7 / 7 for i in range(500)]
    assert bootstrap_interval(values, 3) == bootstrap_interval(values, 3)
    assert bootstrap_interval(values, 3) != bootstrap_interval(values, 4)
    normal = 1.96 * float(np.std(values)) / 500**0.5  # of so many values the means are normal
    expected = (np.mean(values) - normal, np.mean(values) + normal)
    assert bootstrap_interval(values, 20260101) == pytest.approx(expected, abs=1e-3)


def test_intervals_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 panels of 30 tasks, mostly easy or hard ones, 8 attempts each: the interval holds the
    truth nearly as often as it says, one over 240 independent attempts by far not."""
    monkeypatch.setattr(evaluation_stats, "RESAMPLES", 500)
    rng, truth, held, held_by_attempts = np.random.default_rng(0), 0.6 / 1.4, 0, 0
    for panel in range(300):
        won = rng.binomial(8, rng.beta(0.6, 0.8, 30)) / 8
        low, high = bootstrap_interval(won.tolist(), panel) or (0.0, 0.0)
        held += low <= truth <= high
        mean = float(won.mean())
        held_by_attempts += abs(mean - truth) <= 1.96 * (mean * (1 - mean) / 240) ** 0.5
    assert 0.9 <= held / 300 <= 0.98 and held_by_attempts / 300 < 0.8


def test_attempts_of_a_prompt_are_no_new_prompts() -> None:
    """Ten prompts that are always or never won: more attempts tell nothing more about prompts."""
    few = mean_at_n([played("1"), played("0")] * 5, 0)
    many = mean_at_n([played("1" * 32), played("0" * 32)] * 5, 0)
    assert few == many and few.high is not None and few.high - few.value >= 0.3


def test_all_numbers_of_two_prompts() -> None:
    look, go = make_turn("look"), make_turn("go", valid=False, void=True)
    groups = [
        group(
            "a",
            "pick",
            replace(make_trajectory("a", 0, [[look]], won=True), env_reward=1.0),
            make_trajectory("a", 1, [[look, go, look]], status=Status.TRUNCATED_TURNS),
        ),
        group(
            "b",
            "heat",
            replace(make_trajectory("b", 0, [[look, go]]), env_reward=0.5),
            make_trajectory("b", 1, won=True, status=Status.FAILED_TOOL),
        ),
    ]
    told = statistics(groups, attempts=2, seed=5)
    assert told["attempts"] == 2
    assert told["mean_at_n"] == {"value": 0.25, "low": 0.0, "high": 0.5, "prompts": 2}
    assert {k: v["value"] for k, v in told["pass_at_k"].items()} == {"1": 0.25, "2": 1.0}
    assert told["pass_at_k"]["2"] == {"value": 1.0, "low": None, "high": None, "prompts": 1}
    assert told["score"]["value"] == 0.5
    assert {k: v["value"] for k, v in told["by_kind"].items()} == {"heat": 0.0, "pick": 0.5}
    assert told["trajectories"] == {
        "played": 3,
        "turns_mean": 2.0,
        "action_tokens_mean": pytest.approx(2 * len(look.action_tokens)),
        "invalid_turn_fraction": pytest.approx(2 / 6),
        "void_turn_fraction": pytest.approx(2 / 6),
        "truncated_fraction": pytest.approx(1 / 3),
        "failed": 1,
    }
    b: dict[str, Any] = told["prompts"][1]
    assert b == {
        "prompt_id": "b", "kind": "heat", "attempts": 1, "won": 0, "failed": 1, "score": 0.5
    }  # fmt: skip


def test_nothing_played_is_no_division_by_zero() -> None:
    failed = make_trajectory("a", 0, status=Status.FAILED_ENGINE)
    told = statistics([group("a", "", failed)], attempts=1, seed=0)
    assert told["mean_at_n"]["value"] is None and told["by_kind"] == {}
    assert trajectory_means([])["turns_mean"] == 0.0 and told["trajectories"]["failed"] == 1
