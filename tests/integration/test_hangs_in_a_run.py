"""A training job in which a rank hangs ends within a minute of the limit, and says which rank."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import arguments, run_here

from megatron_spear.cli.main import PEER_GONE_EXIT
from megatron_spear.deadlines import HANG_EXIT_CODE
from megatron_spear.testing.faults import Rank, ranks_that_may_fail, replaced, sleep_for_ever

pytestmark = pytest.mark.timeout(300)

LIMIT_S = 30.0
OVER_S = 60.0
SETTINGS = (
    "run.steps=3",
    f"run.hang_limit_s={LIMIT_S:g}",
    "rollout.engine_deadline_s=15",
    "rollout.env_deadline_s=15",
    "algorithm.keep_groups_fraction=1.0",
)

SLEEPER = """
import os, time

from megatron_spear.trainer.hooks.base import Hook


class Sleeper(Hook):
    def on_scored(self, ctx, groups):
        if ctx.step == 2:
            os.write(2, b"now\\n")
            time.sleep(3600)
        return groups
"""


def train_with_a_fault(command_line: list[str], culprit: int, fault: str) -> None:
    """The command; in its second optimizer step this rank sleeps for ever or is killed."""
    from megatron_spear.policy.policy import MegatronPolicy

    original, seen = MegatronPolicy.compute_gradient, []

    def hangs_in_the_second(self: Any, batches: Any, loss: Any) -> Any:
        seen.append(loss)
        if len(seen) == 2:
            os.write(2, b"now\n")
            if fault == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            sleep_for_ever()
        return original(self, batches, loss)

    hung = hangs_in_the_second if int(os.environ["RANK"]) == culprit else original
    with replaced(MegatronPolicy, "compute_gradient", hung):
        done = run_here(command_line)
    os.write(2, f"{done.status}\n{done.err}".encode())
    os._exit(done.status)


def all_have_expired(ranks: list[Rank], began: float) -> None:
    for rank in ranks:
        rank.wait(LIMIT_S + OVER_S)
        assert rank.status == HANG_EXIT_CODE, (rank.status, rank.err)
        assert "stacks of all threads follow" in rank.err
    assert time.monotonic() - began < LIMIT_S + OVER_S


def test_a_rank_that_hangs_in_its_step_is_named(cache: Path, tmp_path: Path) -> None:
    line = arguments("train", cache, (*SETTINGS, f"run.dir={tmp_path / 'run'}"))
    with ranks_that_may_fail(train_with_a_fault, 2, tmp_path / "log", line, 1, "sleeps") as ranks:
        ranks[1].until_it_says("now", 120.0)
        all_have_expired(ranks, time.monotonic())
    for rank in ranks:
        assert re.search(
            r"watchdog: rank 1 on \S+ \(pid \d+\) holds the others up; it has not moved for "
            r"\d+ s: step \d: train, at faults.py:\d+ in sleep_for_ever",
            rank.err,
        ), rank.err
        assert re.search(r"watchdog: rank 0 waits in: step \d: train", rank.err), rank.err


def test_a_rank_that_is_killed_ends_the_others_with_one_message(
    cache: Path, tmp_path: Path
) -> None:
    line = arguments("train", cache, (*SETTINGS, f"run.dir={tmp_path / 'run'}"))
    with ranks_that_may_fail(
        train_with_a_fault, 2, tmp_path / "log", line, 1, "is killed"
    ) as ranks:
        ranks[1].until_it_says("now", 120.0)
        assert ranks[0].wait(LIMIT_S) == PEER_GONE_EXIT, ranks[0].err
    assert "Traceback" not in ranks[0].err
    assert re.search(
        r"error: rank 0 ends because the ranks are not all there: rank 1 on \S+ \(pid \d+\) has "
        r"ended: its process is gone \(killed, or a crash\); last seen in: ",
        ranks[0].err,
    ), ranks[0].err


def test_a_hook_that_sleeps_is_named_under_torchrun(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    """On the controller, while the other rank waits for its word."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    hooks = json.dumps([{"name": "sleeper", "path": f"{tmp_path / 'sleeper.py'}:Sleeper"}])
    run_dir = tmp_path / "run"
    limit_s = 2 * LIMIT_S  # torchrun's ranks import everything first, both at once
    settings = (*SETTINGS, f"run.hang_limit_s={limit_s:g}", f"hooks={hooks}")
    launched = launch(f"run.dir={run_dir}", *settings, ranks=2)
    until = time.monotonic() + 150.0
    while "now\n" not in launched.err:
        assert launched.process.poll() is None, launched.out + launched.err
        assert time.monotonic() < until, launched.out + launched.err
        time.sleep(0.1)
    done = launched.wait(limit_s + OVER_S)
    assert done.status == 1, done.err  # torchrun's own
    assert f"exitcode  : {HANG_EXIT_CODE}" in done.err
    assert re.search(
        r"watchdog: rank 0 on \S+ \(pid \d+\) holds the others up; it has not moved for \d+ s: "
        r"step 2: rollout, at sleeper.py:\d+ in on_scored",
        done.err,
    ), done.err
    assert "watchdog: rank 1 waits in: step 2: old_logprobs, the controller's word" in done.err
