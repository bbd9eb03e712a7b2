"""Stands in for ``launch preflight`` and ``launch node`` in a job: ``stand_in.py PHASE ATTEMPT``.

What it does is in the file ``plan.json`` of the run directory, a list with an entry an attempt (the
last one goes for all further ones): ``{"preflight": WORD, "node": WORD}``, without a word: all is
well. What it saw is in ``seen.jsonl``, a line a node and phase.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megatron_spear.cluster.attempt import Attempt, newest_checkpoint

TOO_LONG_S = 60.0


def main() -> int:
    phase, attempt = sys.argv[1], Attempt(Path(sys.argv[2]))
    heard: list[str] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(signal.Signals(number).name)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, hear)
    index = int(os.environ["SLURM_NODEID"])
    _note(attempt, phase, index)
    plan = json.loads((attempt.run / "plan.json").read_text())
    word = plan[min(attempt.number, len(plan) - 1)].get(phase, "")
    if phase == "preflight":
        return _preflight(attempt, word, index, heard)
    return _node(attempt, word, index, heard)


def _note(attempt: Attempt, phase: str, index: int) -> None:
    line = {
        "attempt": attempt.number,
        "phase": phase,
        "index": index,
        "node": os.environ["SLURMD_NODENAME"],
        "quoted": os.environ.get("QUOTED"),
    }
    with (attempt.run / "seen.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _preflight(attempt: Attempt, word: str, index: int, heard: list[str]) -> int:
    """``bad NAME``: one node is listed; ``wait``: until a signal comes."""
    if word.startswith("bad "):
        if index == 0:
            (attempt.run / "bad_nodes").write_text(word.removeprefix("bad ") + "\n")
        return 3
    if word == "wait":
        _wait(lambda: bool(heard))
        return 1
    return 0


def _node(attempt: Attempt, word: str, index: int, heard: list[str]) -> int:
    """``wait``: until a signal comes, then save and stop; ``lose``: the same without saving;
    ``crash``: the second node dies; ``save, crash``: after a new checkpoint."""
    if word == "save, crash" and index == 0:
        _save(attempt)
    if "crash" in word and index == 1:
        _wait(lambda: word == "crash" or newest_checkpoint(attempt.run) > attempt.number)
        os.kill(os.getpid(), signal.SIGKILL)
    if word:
        _wait(lambda: bool(heard))
    if word == "wait":
        if index == 0:
            attempt.mark_stopped(heard[0], _save(attempt))
        return 0
    if word:
        return 1
    attempt.mark_done(index)
    _wait(lambda: attempt.num_done() == int(os.environ["SLURM_NNODES"]))
    return 0


def _save(attempt: Attempt) -> int:
    step = newest_checkpoint(attempt.run) + 1
    (attempt.run / "checkpoints" / f"step_{step}").mkdir(parents=True)
    return step


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TOO_LONG_S
    while not condition():
        if time.monotonic() > end:
            sys.exit("waited too long")
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
