"""The helper that runs functions on gloo ranks: order, failures, deadlines."""

import os
import time

import pytest

from megatron_spear.testing.ranks import RankFailed, run_ranks


def rank_and(value: int) -> tuple[int, int]:
    return int(os.environ["RANK"]), value


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("this rank is broken")
    time.sleep(60)


def die_on_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(60)


def sleep_on_one() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def test_results_come_in_rank_order() -> None:
    assert run_ranks(rank_and, 2, 7) == [(0, 7), (1, 7)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_one, "(?s)rank 1 of 2 failed.*ValueError: this rank is broken"),
        (die_on_one, "rank 1 of 2 died"),
        (sleep_on_one, r"ranks 1 of 2 did not finish in 1\.0 s"),
    ],
)
def test_failures_are_named_and_nobody_is_left(function, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=message):
        run_ranks(function, 2, timeout_s=1.0 if function is sleep_on_one else 60.0)
    assert time.monotonic() - start < 30
