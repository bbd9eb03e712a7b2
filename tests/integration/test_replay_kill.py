"""200 kills (SIGKILL) at random moments of a run that fills, releases and saves a replay store.

    python tests/integration/test_replay_kill.py FOLDER    # what the test runs; prints a report

A worker process repeats one deterministic step: draw rows and take them, add rows, evict, and every
few steps commit a checkpoint and prune. It is killed; the next worker resumes from the newest
checkpoint. What a worker holds after resuming, and each of its draws down to the bytes, must be
those of a run that was never stopped. Workers are forked from a process that has no torch.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from mmap import mmap
from pathlib import Path

import numpy as np

from megatron_spear.algorithms.draws import raw_draws
from megatron_spear.replay.store import ReplayStore
from megatron_spear.trainer.commit import CheckpointStore
from megatron_spear.types import Reward, TrainSample, TrajectoryId

KILLS = 200
CAPACITY, MAX_AGE, ROWS_ADDED, ROWS_DRAWN = 90, 8, 12, 7
CHECKPOINT_EVERY, KEPT = 4, 2
MAX_STEPS = 6
"""Most steps a worker is let finish before its last; all are equally frequent, so is none."""
PHASES = ("resume", "take", "add", "save", "prune")


def test_a_killed_run_goes_on_as_one_that_was_never_killed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sum(report["killed_in"].values()) == KILLS
    assert set(report["killed_in"]) >= {"resume", "take", "add", "save"}, report
    assert report["half_written_segments"] >= 10, report
    assert report["half_written_checkpoints"] >= 5, report
    assert report["uncommitted_segments"] >= KILLS / 4, report
    assert report["steps"] >= KILLS, report


def make_trajectory(step: int, member: int) -> list[TrainSample]:
    """One segment of 1 to 4,096 tokens, a function of (step, member)."""
    draw = np.random.Generator(np.random.Philox(key=np.array([step, member], np.uint64)))
    length = int(draw.integers(1, 4097))
    logprobs = draw.random(length, np.float32)
    return [
        TrainSample(
            trajectory_id=TrajectoryId(group=f"g{step}", member=member),
            segment=0,
            num_segments=1,
            prompt_id=f"p{step % 5}",
            token_ids=draw.integers(0, 1000, length).astype(np.int32),
            response_mask=np.ones(length, np.bool_),
            rollout_logprobs=logprobs,
            old_logprobs=logprobs + 1,
            advantages=np.full(length, member, np.float32),
            reward=Reward(outcome=float(member)),
            turn_starts=np.zeros(1, np.int32),
            anchors=("start",),
            policy_version=step,
        )
    ]


def draw_rows(store: ReplayStore, step: int) -> tuple[list[int], str]:
    """Take this step's rows: their ids, and a hash of ids and content."""
    index = store.index()
    order = np.argsort([raw_draws(1, 0, step, int(key))[0] for key in index.trajectory_keys])
    row_ids = index.row_ids[order[:ROWS_DRAWN]].tolist()
    content = hashlib.sha256(repr(row_ids).encode())
    for (sample,) in store.take(row_ids):
        content.update(repr((sample.trajectory_id, sample.reward)).encode())
        for array in (sample.token_ids, sample.old_logprobs, sample.advantages):
            content.update(array.tobytes())
    return row_ids, content.hexdigest()


def insert_rows(store: ReplayStore, step: int) -> None:
    store.add([make_trajectory(step, member) for member in range(ROWS_ADDED)])
    store.evict_older_than(step - MAX_AGE)


def state_hash(store: ReplayStore) -> str:
    """Of the columns of all rows that may be taken, and of the next row's id."""
    index = store.index()
    columns = [getattr(index, name).tobytes() for name in index.__slots__]
    return hashlib.sha256(b"".join(columns) + repr(store.next_row).encode()).hexdigest()


class Worker:
    """The life of one process: resume, then step until killed; ``phase`` says what it is at."""

    def __init__(self, folder: Path, phase: mmap) -> None:
        self._store = ReplayStore(folder / "replay", CAPACITY)
        self._checkpoints = CheckpointStore(folder / "checkpoints", keep=KEPT)
        self._phase = phase
        self._log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._step = 0

    def resume(self) -> None:
        """Go back to the newest checkpoint; like every draw, what is found is logged."""
        self._enter("resume")
        self._checkpoints.sweep()
        if newest := next(self._checkpoints.whole(), None):
            self._step = newest.step
            self._store.load_state_dict(json.loads((newest.path / "state").read_text()))
        self._note("resumed", state_hash(self._store))

    def step(self) -> None:
        self._step += 1
        self._enter("take")
        self._note("drawn", draw_rows(self._store, self._step)[1])
        self._enter("add")
        insert_rows(self._store, self._step)
        if self._step % CHECKPOINT_EVERY == 0:
            self._save(self._step)

    def _save(self, step: int) -> None:
        self._enter("save")
        with self._checkpoints.saving(step) as folder:
            (folder / "state").write_text(json.dumps(self._store.state_dict()))
        self._enter("prune")
        kept = [self._checkpoints.folder / f"step_{s}" / "state" for s in self._checkpoints.steps()]
        self._store.prune([json.loads(path.read_text()) for path in kept])

    def _enter(self, phase: str) -> None:
        self._phase[0] = PHASES.index(phase)

    def _note(self, what: str, content: str) -> None:
        os.write(self._log, f"{what} {self._step} {content}\n".encode())


class Reference:
    """The same steps, never stopped: hashes of each draw and of the state after each step."""

    def __init__(self, folder: Path) -> None:
        self._store = ReplayStore(folder, CAPACITY)
        self._taken: set[int] = set()
        self.draws = [""]
        self.states = [state_hash(self._store)]

    def go_to(self, step: int) -> None:
        for now in range(len(self.states), step + 1):
            row_ids, content = draw_rows(self._store, now)
            assert self._taken.isdisjoint(row_ids), "a row was released twice"
            self._taken.update(row_ids)
            insert_rows(self._store, now)
            self._store.prune([])
            self.draws.append(content)
            self.states.append(state_hash(self._store))


def start_worker(folder: Path, phase: mmap) -> tuple[int, int]:
    """Fork a worker: its process id, and a pipe it writes a byte to when it has resumed and after
    each step."""
    reading, writing = os.pipe()
    parent, worker = os.getpid(), os.fork()
    if worker:
        os.close(writing)
        return worker, reading
    try:
        life = Worker(folder, phase)
        life.resume()
        while os.getppid() == parent:
            os.write(writing, b".")
            life.step()
    finally:
        traceback.print_exc()
        os._exit(1)


def kill_worker(worker: int, at_work: int, number: int, pace_s: float) -> float:
    """Let it do some steps, or not even resume, and kill it at a random moment of the next one.

    Counted in steps of ``pace_s``, not in time, so that a busy machine changes little. Returns the
    seconds a step took.
    """
    steps, moment = raw_draws(2, 0, "kill", number)
    start, num_seen = time.perf_counter(), int(steps % (MAX_STEPS + 2))
    for _ in range(num_seen):
        os.read(at_work, 1)
    pace_s = (time.perf_counter() - start) / num_seen if num_seen else pace_s
    time.sleep(1.2 * pace_s * float(moment) / 2**64)
    os.kill(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    os.close(at_work)
    assert os.WIFSIGNALED(status), f"worker {number} failed by itself, see above"
    return pace_s


def check_life(lines: list[str], committed: int, reference: Reference) -> int:
    """Compare what one worker logged with the reference; returns its last step."""
    last = 0
    for what, number, content in map(str.split, lines):
        last = int(number)
        reference.go_to(last)
        if what == "resumed":
            assert last == committed, f"resumed at {last}, the newest checkpoint is {committed}"
            assert content == reference.states[last], f"other rows after resuming at step {last}"
        else:
            assert content == reference.draws[last], f"another draw in step {last}"
    return last


def count_leftovers(folder: Path, committed: int, seen: Counter[str]) -> None:
    """What a kill left: files half-written, and whole ones that no checkpoint names."""
    replay, checkpoints = folder / "replay", folder / "checkpoints"
    seen["half_written_segments"] += any(replay.glob("*.tmp"))
    seen["half_written_checkpoints"] += any(checkpoints.glob("step_*.t*"))
    state = checkpoints / f"step_{committed}" / "state"
    next_file = json.loads(state.read_text())["next_file"] if committed else 0
    seen["uncommitted_segments"] += (replay / f"segment-{next_file:08d}.bin").exists()


def main(folder: Path) -> dict[str, object]:
    assert "torch" not in sys.modules, "workers start quickly because the store needs no torch"
    phase, log = mmap(-1, 1), folder / "log"
    reference = Reference(folder / "reference")
    checkpoints = CheckpointStore(folder / "checkpoints", keep=KEPT)
    killed_in: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    committed = last = num_lines = 0
    pace_s = 0.01
    for number in range(KILLS):
        pace_s = kill_worker(*start_worker(folder, phase), number, pace_s)
        killed_in[PHASES[phase[0]]] += 1
        lines = log.read_text().splitlines() if log.exists() else []
        last = max(last, check_life(lines[num_lines:], committed, reference))
        num_lines = len(lines)
        newest = max(checkpoints.steps(), default=0)
        assert newest >= committed, f"the checkpoint of step {committed} is gone"
        committed = newest
        count_leftovers(folder, committed, seen)
    Worker(folder, phase).resume()
    check_life(log.read_text().splitlines()[num_lines:], committed, reference)
    return {"killed_in": killed_in, "steps": last, **seen}


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1])), sys.stdout)
