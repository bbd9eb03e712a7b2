"""Checkpoints that are written while the run goes on: the same run, and a kill costs one."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

SETTINGS = (
    "run.steps=4",
    "policy.optimizer.lr=0.002",
    "algorithm.keep_groups_fraction=1.0",
    "replay.rows_per_step=2",
    "checkpoint.every=1",
    "checkpoint.keep=4",
)
ASYNC = "checkpoint.async_save=true"

STANDING = '''
import time
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_spear.trainer.hooks.base import Hook

write = FileSystemWriterAsync.write_preloaded_data


class Standing(Hook):
    """From the third checkpoint on, files stand half-written until there is a file called "go"."""

    def __init__(self):
        FileSystemWriterAsync.write_preloaded_data = staticmethod(slow)


def slow(transforms, number, bucket, *args, **kwargs):
    path, name, data = bucket
    if "step_3" in path and not Path("go").exists():
        Path(path).write_bytes(b"half of it")
        Path("standing").touch()
        while not Path("go").exists():
            time.sleep(0.01)
    return write(transforms, number, bucket, *args, **kwargs)
'''


def test_a_kill_while_files_are_written_costs_that_checkpoint(
    launch: Callable[..., Any],
    spear: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same_run: Callable[[Path, Path], None],
) -> None:
    """SIGKILL with step 3 half-written and step 4 begun; the run goes on from step 2 and ends as
    one that waited for its files."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    spear("train", f"run.dir={whole}", *SETTINGS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "standing.py").write_text(STANDING)
    hook = f"hooks={json.dumps([{'name': 'standing', 'path': './standing.py:Standing'}])}"
    launched = launch(f"run.dir={run_dir}", *SETTINGS, ASYNC, hook)
    folder, records = run_dir / "checkpoints", run_dir / "metrics.jsonl"

    def fourth_step_done() -> bool:
        return records.is_file() and '"step": 4,' in records.read_text()

    deadline = time.monotonic() + 180
    while not ((tmp_path / "standing").exists() and fourth_step_done()):
        assert launched.process.poll() is None, launched.out + launched.err
        assert time.monotonic() < deadline, launched.out + launched.err
        time.sleep(0.02)
    launched.kill()
    assert launched.process.returncode == -signal.SIGKILL
    assert sorted(p.name for p in folder.iterdir()) == ["step_1", "step_2", "step_3.tmp"]
    (tmp_path / "go").touch()
    done = launch(f"resume={run_dir}", *SETTINGS, ASYNC, hook).wait(120)
    assert done.status == 0, done.out + done.err
    assert "continuing after step 2 of 4" in done.out
    same_run(whole, run_dir)
    assert sorted(p.name for p in folder.iterdir()) == [f"step_{n}" for n in (1, 2, 3, 4)]
