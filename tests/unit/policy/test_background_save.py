"""A save beside the training holds what a save at its beginning holds."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.errors import CheckpointError
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No file is written in a thread before this is set."""
    event, main = threading.Event(), threading.current_thread()
    write = FileSystemWriterAsync.write_preloaded_data

    def slow(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not main:
            assert event.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(slow))
    yield event
    event.set()


def make(path: Path, ctx: ParallelContext, **policy: Any) -> MegatronPolicy:
    optimizer = OptimizerSection(lr=1e-2, warmup_steps=3)
    return MegatronPolicy.from_hf(path, PolicySection(**policy), optimizer, 10, ctx)


def train(policy: MegatronPolicy, steps: int) -> list[float]:
    packed = pack(*random_samples(), tokens_per_microbatch=200)
    return [policy.train_step(packed, WeightedNll())["loss/total"] for _ in range(steps)]


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16"}, {"distributed_optimizer": True}], ids=str
)
def test_later_training_does_not_change_what_is_written(
    changes: dict[str, Any], tmp_path: Path, ctx: ParallelContext, go: threading.Event
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    policy = make(tmp_path / "hf", ctx, **changes)
    train(policy, 2)
    policy.save(tmp_path / "waited-for")
    pending = policy.begin_save(tmp_path / "beside")
    expected = train(policy, 2)
    assert not pending.writing.done() and not list((tmp_path / "beside").glob("*.distcp"))
    assert not (tmp_path / "beside" / "policy.json").exists()
    go.set()
    pending.finish()
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("waited-for", "beside")
    )
    assert one.keys() == other.keys() and len(one) >= 4
    assert all(other[name] == one[name] for name in one if name != ".metadata")
    resumed = make(tmp_path / "hf", ctx, **changes)
    resumed.load(tmp_path / "beside")
    assert train(resumed, 2) == expected


def test_an_abandoned_save_stops_at_the_next_tensor(
    tmp_path: Path, ctx: ParallelContext, go: threading.Event
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    policy = make(tmp_path / "hf", ctx)
    pending = policy.begin_save(tmp_path / "state")
    pending.abandon()
    go.set()
    with pytest.raises(CheckpointError, match=r"cannot be written.*the save was abandoned"):
        pending.finish()
    policy.save(tmp_path / "another")
    written, whole = (
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.distcp"))
        for name in ("state", "another")
    )
    assert 4 * written < whole
