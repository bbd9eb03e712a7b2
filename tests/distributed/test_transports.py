"""Weights of a policy on 2 and on 4 gloo ranks arrive whole by every transport that streams them.

(``sharded`` is held to the same in test_sharded_weights.py.)
"""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.servers import FakeFleet, ServerProcesses
from megatron_spear.testing.tiny import tiny_hf_folder

LAYOUTS = {2: {"tensor_parallel": 2}, 4: {"tensor_parallel": 2, "pipeline_parallel": 2}}
Held = list[dict[str, torch.Tensor]]


def _on_a_rank(
    transport: str, layout: dict[str, int], folders: list[Path], addresses: list[list[str]]
) -> tuple[dict[str, float], Held]:
    """One update from the first folder's policy: its metrics, and what each engine rank holds."""
    from megatron_spear.config.rollout import RolloutSection, WeightSyncSection
    from megatron_spear.config.schema import OptimizerSection, PolicySection
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy
    from megatron_spear.rollout.engines.embedded import EmbeddedEngine
    from megatron_spear.rollout.event_loop import EventLoop
    from megatron_spear.trainer.transports import make_transport

    model, other, weights = folders
    section = PolicySection(**layout)
    ctx = parallel.initialize(section, seed=0, timeout_s=60.0)
    policy = MegatronPolicy.from_hf(model, section, OptimizerSection(), 1, ctx)
    settings = {"engine": "sglang", "servers": ("http://127.0.0.1:1",)}
    with ExitStack() as stack:
        made: Any = None
        if ctx.is_controller:
            loop = stack.enter_context(EventLoop("rollout"))
            fleet = stack.enter_context(FakeFleet(addresses, None)) if addresses else None
            engine = None
            if fleet is None:
                room = {"max_slots": 1, "max_context": 32, "deadline_s": 30.0}
                engine = EmbeddedEngine.from_hf(other, **room)
            made = (loop, SimpleNamespace(engine=engine, updates=fleet))
        to = make_transport(
            RolloutSection() if transport == "in_process" else RolloutSection(**settings),
            WeightSyncSection(transport=transport, bucket_bytes=20_000, deadline_s=60.0),
            policy,
            made,
            virtual_pipeline=1,
            model=model,
            folder=weights,
        )
        metrics = to.publish(3)
        held: Held = []
        if made is not None:
            held = (
                [{name: view.clone() for name, view in engine.weights.views.items()}]
                if engine is not None
                else [rank for server in fleet.servers for rank in server.held()]
            )
        to.close()
    return metrics, held


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("transport", ["in_process", "broadcast", "disk", "ipc"])
def test_all_weights_arrive(transport: str, ranks: int, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("model", "other", "weights")]
    tiny_hf_folder(folders[0])
    tiny_hf_folder(folders[1], initializer_range=0.04)
    with ExitStack() as stack:
        addresses: list[list[str]] = []
        if transport != "in_process":
            addresses = stack.enter_context(ServerProcesses(2, num_ranks=1)).addresses
        given = (transport, LAYOUTS[ranks], folders, addresses)
        (metrics, held), *others = run_ranks(_on_a_rank, ranks, *given, timeout_s=120.0)
    with HfReader(folders[0]) as reader:
        expected = {name: reader.get(name) for name in reader.names}
    assert len(held) == (1 if transport == "in_process" else 2)
    for rank in held:
        assert rank.keys() == expected.keys()
        assert all(torch.equal(rank[name], tensor) for name, tensor in expected.items())
    size = sum(tensor.nbytes for tensor in expected.values())
    copies = {"in_process": 1, "disk": 1, "broadcast": 2, "ipc": 2}[transport]
    assert metrics["weight_sync/bytes"] == size * copies
    assert all(own["weight_sync/bytes"] == 0 for own, _ in others)
