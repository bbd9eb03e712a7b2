"""A run on this machine alone: attempt after attempt, each with one supervisor in this process."""

import asyncio
import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.keepers import Node, Times
from megatron_spear.cluster.restarts import Verdict, grant_restarts, judge
from megatron_spear.cluster.stop import StopSignals
from megatron_spear.cluster.supervisor import Starts, Supervisor
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import ConfigError

STOPPED_EXIT = 130
LOCK_NAME = "launch.lock"
_PAUSE_S, _MAX_PAUSE_S = 1.0, 60.0


def one_machine_problems(config: RunConfig) -> Iterator[str]:
    """What is for several machines."""
    cluster = config.cluster
    if cluster.trainer_nodes != 1 or cluster.engine_nodes:
        yield (
            f"cluster.trainer_nodes={cluster.trainer_nodes} and "
            f"cluster.engine_nodes={cluster.engine_nodes} are several machines, and `launch local` "
            "has this one; set them to 1 and 0 (all roles then share it), or use `launch slurm`"
        )


def this_node(config: RunConfig) -> Node:
    """This machine as the only node of a job, reached by its loopback address unless
    ``cluster.network.address`` is set."""
    address = config.cluster.network.address or "127.0.0.1"
    return Node(index=0, name=socket.gethostname(), address=address)


def run_attempts(
    config: RunConfig,
    run: Path,
    *,
    stop: StopSignals,
    say: Callable[[str], None],
    times: Times | None = None,
    starts: Callable[[Attempt], Starts] | None = None,
) -> int:
    """Attempts until the run is done, stopped or not worth another; gives the exit status.

    A crash is followed by another attempt, from the newest checkpoint, within
    ``cluster.max_restarts``. A stop that was asked for is not.
    """
    with only_launch(run):
        grant_restarts(run)
        pause_s = _PAUSE_S
        while True:
            attempt = Attempt.begin(run)
            say(f"attempt {attempt.number} of {run}")
            supervisor = Supervisor(
                config,
                attempt,
                this_node(config),
                stop=stop,
                say=say,
                times=times,
                starts=starts(attempt) if starts is not None else None,
            )
            status = asyncio.run(supervisor.run())
            if stop.reason and (status or attempt.stopped_file.exists()):
                go_on = f"megatron-spear launch local resume={run}"
                say(f"stopped by {stop.reason}; go on with: {go_on}")
                return STOPPED_EXIT
            judgement = judge(attempt, status, config.cluster)
            say(f"attempt {attempt.number}: {judgement.reason}")
            if judgement.verdict is not Verdict.AGAIN:
                return 0 if judgement.verdict is Verdict.DONE else status or 1
            _pause(pause_s, stop)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            if stop.reason:
                return STOPPED_EXIT


@contextlib.contextmanager
def only_launch(run: Path) -> Iterator[None]:
    """For the length of the block no other ``launch local`` may run this run on any machine that
    shares its locks; ConfigError where one does."""
    handle = os.open(run / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run}: another `launch local` is running this run; wait for it, stop it, or "
                "choose another run.dir"
            ) from None
        yield
    finally:
        os.close(handle)


def _pause(seconds: float, stop: StopSignals) -> None:
    """Wait before another attempt; a stop ends the wait."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop.reason:
        time.sleep(0.1)
