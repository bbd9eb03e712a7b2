"""Checkpoints are there whole or not at all."""

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_spear.errors import CheckpointError
from megatron_spear.trainer.commit import Checkpoint, CheckpointStore


def save(store: CheckpointStore, step: int, text: str = "") -> Path:
    with store.saving(step) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "w.bin").write_bytes(bytes([step]) * 1000)
        (folder / "rng.json").write_text(text or f"rng of {step}")
    return store.folder / f"step_{step}"


def latest(store: CheckpointStore) -> Checkpoint:
    """The newest whole checkpoint; there must be one."""
    return next(store.whole())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_newest_come_first_and_older_ones_are_pruned(store: CheckpointStore) -> None:
    assert list(store.whole()) == []
    store.sweep()
    for step in (5, 10, 100):
        save(store, step)
    assert [found.step for found in store.whole()] == [100, 10]
    newest = latest(store)
    assert newest.path == store.folder / "step_100"
    assert (newest.path / "model" / "w.bin").read_bytes() == bytes([100]) * 1000
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_10", "step_100"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: (p / "rng.json").write_text("rng of 2 longer"), "rng.json has 15 bytes"),
        (lambda p: (p / "rng.json").write_text("rng of 9"), "rng.json has sha256"),
        (lambda p: flip(p / "model" / "w.bin", 500), "w.bin has sha256"),
        (lambda p: os.truncate(p / "model" / "w.bin", 500), "w.bin has 500 bytes, expected 1000"),
        (lambda p: (p / "model" / "w.bin").unlink(), "w.bin cannot be read"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text('{"step": 2'), "manifest.json is missing"),
        (
            lambda p: replace(p / "manifest.json", '"bytes": 1000', '"bytes": 1001'),
            "own",
        ),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is missing"),
    ],
)
def test_falls_back_past_a_damaged_one_and_says_why(store, damage, told, caplog) -> None:
    save(store, 1)
    damage(save(store, 2))
    with caplog.at_level(logging.WARNING):
        assert [found.step for found in store.whole()] == [1]
    assert "step_2" in caplog.text
    assert told in caplog.text
    store.set_aside_after(1)
    assert store.steps() == (1,)
    assert (store.folder / "step_2.damaged").is_dir()
    save(store, 2)
    assert latest(store).step == 2


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_leftovers_of_a_kill_are_ignored_and_swept(store: CheckpointStore) -> None:
    save(store, 1)
    store.begin(2).joinpath("half").write_text("x")
    (store.folder / "step_0.trash").mkdir()
    assert latest(store).step == 1
    assert store.tmp_path(2).is_dir(), "reading must not sweep another process's work"
    store.sweep()
    assert [p.name for p in store.folder.iterdir()] == ["step_1"]


def test_the_same_step_can_be_written_again(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 1, "second time")
    assert (latest(store).path / "rng.json").read_text() == "second time"
    assert [p.name for p in store.folder.iterdir()] == ["step_1"]


def test_a_mistake_while_saving_is_raised_and_leaves_nothing(store: CheckpointStore) -> None:
    save(store, 1)
    with pytest.raises(KeyError), store.saving(2) as folder:
        (folder / "a").write_text("a")
        raise KeyError("bug")
    assert [p.name for p in store.folder.iterdir()] == ["step_1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),
    ],
)
def test_full_disk_is_told_and_spares_earlier_checkpoints(store, error) -> None:
    save(store, 1)
    told = r"disk is full.*kB were written.*are free in"
    with pytest.raises(CheckpointError, match=told), store.saving(2) as folder:
        (folder / "big").write_bytes(bytes(5000))
        raise error
    assert [p.name for p in store.folder.iterdir()] == ["step_1"]
    assert latest(store).step == 1


def test_a_real_write_limit_is_a_checkpoint_error(store: CheckpointStore) -> None:
    """RLIMIT_FSIZE gives a real EFBIG from the kernel; a full tmpfs would need root."""
    save(store, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
        told = "full or a quota"
        with pytest.raises(CheckpointError, match=told), store.saving(2) as folder:
            (folder / "big").write_bytes(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert latest(store).step == 1


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root (CAP_SYS_ADMIN)")
    try:
        store = CheckpointStore(disk / "checkpoints", keep=2)
        save(store, 1)
        told = "disk is full"
        with pytest.raises(CheckpointError, match=told), store.saving(2) as folder:
            (folder / "big").write_bytes(bytes(1 << 20))
        assert latest(store).step == 1
        save(store, 2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_one_rank_failing_fails_all_ranks(store: CheckpointStore) -> None:
    votes = iter([True, False])
    saving = store.saving(1, agree=lambda ok: next(votes))
    with pytest.raises(CheckpointError, match="another rank"), saving as folder:
        (folder / "a").write_text("a")
    assert list(store.whole()) == []
    assert list(store.folder.iterdir()) == []


def test_other_ranks_write_but_do_not_commit(store: CheckpointStore) -> None:
    seen: list[bool] = []
    store.begin(1)
    with store.saving(1, controller=False, agree=lambda ok: seen.append(ok) or True) as folder:
        (folder / "rank_1").write_text("mine")
    assert seen == [True, True, True]
    assert store.steps() == ()
    store.commit(1)
    assert (latest(store).path / "rank_1").read_text() == "mine"


_DRIVER = """
    import hashlib, os, random, signal, sys, time
    from pathlib import Path
    from megatron_spear.trainer.commit import CheckpointStore

    def after(state, step):
        return hashlib.sha256(state + step.to_bytes(4, "big")).digest()

    def train(folder, last):
        store = CheckpointStore(Path(folder), keep=2)
        store.sweep()
        found = next(store.whole(), None)
        step = found.step if found else 0
        state = (found.path / "state").read_bytes() if found else b""
        while step < last:
            step += 1
            state = after(state, step)
            with store.saving(step) as tmp:
                (tmp / "state").write_bytes(state)
                (tmp / "padding").write_bytes(state * 500)

    def newest(folder):
        return next((c.step for c in CheckpointStore(Path(folder), keep=2).whole()), 0)

    folder, least_steps, least_kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(0)
    kills = reached = 0
    while kills < least_kills or reached < least_steps:  # a busy machine takes more kills
        child = os.fork()
        if child == 0:
            try:
                train(folder, 10**9)
            finally:
                os._exit(3)
        time.sleep(draw.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the trainer failed before it was killed"
        kills, reached = kills + 1, newest(folder)
    train(folder, reached + 3)
    final = next(CheckpointStore(Path(folder), keep=2).whole())
    state = b""
    for step in range(1, reached + 4):
        state = after(state, step)
    assert (final.path / "state").read_bytes() == state
    assert sorted(p.name for p in Path(folder).iterdir()) == sorted(
        [f"step_{reached + 2}", f"step_{reached + 3}"]
    )
    print(reached)
"""


def test_survives_kill_9_at_random_moments(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_DRIVER), str(tmp_path), "8", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8
