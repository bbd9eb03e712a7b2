"""The warm worker: an interpreter that is up, and forks a process for each piece of code."""

from __future__ import annotations

import fcntl
import gc
import importlib
import os
import select
import signal
from typing import Any

from megatron_spear.envs.sandbox.inside import jail, keeper

_FAR = 100  # file descriptors that nothing else gets


def main(config: dict[str, Any]) -> None:
    """Serve until the control pipe is closed."""
    control = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _FAR)
    answers = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, _FAR)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.close(nothing)
    word = _prepare(config)
    keeper.send(answers, keeper.SIZE.pack(len(word)) + word)
    if not word:
        os.dup2(0, 2)
        _serve(config, control, answers)


def _prepare(config: dict[str, Any]) -> bytes:
    """What has to be so before the first execution; gives what went wrong, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory ends, we go first
        os.close(jail.process_file(os.getpid()))  # there since Linux 5.3
        for name in config["preload"]:
            importlib.import_module(name)
        if config["jailed"]:
            config["call_filter"] = jail.Filter(bytes.fromhex(config["call_filter"]))
            jail.be_unreadable()
        else:
            jail.adopt_orphans()
    except Exception as error:  # noqa: BLE001 - told to the other side, which raises it
        return f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")[:1000]
    gc.collect()
    gc.freeze()
    return b""


def _serve(config: dict[str, Any], control: int, answers: int) -> None:
    kept = keeper.Keeper(config, control, answers)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    try:
        while any(events & select.POLLIN for _, events in poller.poll()) and kept.execute():
            pass
    finally:
        keeper.end_all(config)
