"""One rank of two cannot write its part of a checkpoint: both hear why, at once, and go on."""

import contextlib
import errno
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.errors import CheckpointError
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import tiny_hf_folder

FULL = "No space left on device"


@contextlib.contextmanager
def a_small_file_limit() -> Iterator[None]:
    """A real EFBIG from the kernel for every file of this process above 16 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@contextlib.contextmanager
def full_disk_in(owner: Any, name: str) -> Iterator[None]:
    """This function finds the disk full."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, FULL)

    original = getattr(owner, name)
    setattr(owner, name, refuse)
    try:
        yield
    finally:
        setattr(owner, name, original)


def faults() -> dict[str, tuple[int, Callable[[], AbstractContextManager[None]]]]:
    """(rank, fault) by name; the functions are Megatron's that write one file on rank 0 alone."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async

    found: dict[str, tuple[int, Callable[[], AbstractContextManager[None]]]] = {
        "files of rank 0": (0, a_small_file_limit),
        "files of rank 1": (1, a_small_file_limit),
        ".metadata": (
            0,
            lambda: full_disk_in(filesystem_async.FileSystemWriterAsync, "finish"),
        ),
        "metadata.json": (0, lambda: full_disk_in(serialization, "save_config")),
        "policy.json": (0, lambda: full_disk_in(Path, "write_text")),
        "the folder": (0, lambda: full_disk_in(Path, "mkdir")),
        "the manifest": (0, lambda: full_disk_in(Path, "replace")),
    }
    if hasattr(common, "TorchCommonSaveStrategy"):  # megatron-core 0.16
        strategy = common.TorchCommonSaveStrategy
        found["common.pt"] = (0, lambda: full_disk_in(strategy, "save_common"))
    return found


def save_with_faults(folder: Path, model: Path) -> dict[tuple[str, bool], tuple[str, float]]:
    """On every rank, by fault and whether a thread writes: what the save of step 2 raised, and
    after how many seconds."""
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy
    from megatron_spear.trainer.commit import CheckpointStore
    from megatron_spear.trainer.ranks import all_true

    section = PolicySection(tensor_parallel=2)
    ctx = parallel.initialize(section, seed=0, timeout_s=60)
    policy = MegatronPolicy.from_hf(model, section, OptimizerSection(), 10, ctx)
    store = CheckpointStore(folder, keep=3)

    def save(step: int, in_thread: bool) -> None:
        with store.saving(step, controller=ctx.is_controller, agree=all_true) as tmp:
            if in_thread:
                policy.begin_save(tmp / "policy").finish()
            else:
                policy.save(tmp / "policy")

    save(1, False)
    results = {}
    for (name, (rank, fault)), in_thread in product(faults().items(), (False, True)):
        started = time.monotonic()
        with fault() if ctx.rank == rank else contextlib.nullcontext():
            try:
                save(2, in_thread)
                told = "nothing"
            except CheckpointError as error:
                told = str(error)
        results[name, in_thread] = (told, time.monotonic() - started)
    save(3, True)
    parallel.destroy()
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("full-disk")
    tiny_hf_folder(root / "hf", num_hidden_layers=2)
    folder = root / "checkpoints"
    return folder, run_ranks(save_with_faults, 2, folder, root / "hf", timeout_s=120)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_hears_of_it_in_seconds(rank: int, saved: tuple[Path, list[Any]]) -> None:
    _, results = saved
    assert len(results[rank]) >= 14
    for name, (told, seconds) in results[rank].items():
        assert "checkpoint of step 2 was not written" in told, (name, told)
        assert seconds < 20, (name, seconds)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_the_policys_files_is_told_on_both(
    rank: int, saved: tuple[Path, list[Any]]
) -> None:
    _, results = saved
    for (name, in_thread), (told, _) in results[rank].items():
        if name.startswith("files of"):
            assert "File too large" in told, (name, in_thread, told)
        elif name not in ("the folder", "the manifest"):  # the commit's own, on rank 0
            assert FULL in told, (name, in_thread, told)


def test_other_checkpoints_are_whole(saved: tuple[Path, list[Any]]) -> None:
    from megatron_spear.trainer.commit import CheckpointStore

    folder, _ = saved
    assert [found.step for found in CheckpointStore(folder, keep=3).whole()] == [3, 1]
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "step_3"]
