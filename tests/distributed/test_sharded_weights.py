"""Weights go slice by slice from every training layout to engines, and equal what the loaders there
keep of whole tensors. The engines' ranks are processes with SGLang's receiver and parameter names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_matrix import CP2, EXPERTS, TP2

from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import tiny_hf_folder

DEADLINE_S = 60.0
BUCKET = 40_000
"""Several messages for each pair, and tensors cut into several."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "TP2": (2, TP2),
    "PP2": (2, {"pipeline_parallel": 2}),
    "CP2": (2, CP2),
    "DP2": (2, {}),
    "TP2xPP2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "TP2xPP2xVPP2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2}),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen2, 2 groups": ("Qwen2", {}),
    "experts": ("Qwen3Moe", {}),
}


def jobs(world_size: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(model, layout, ``policy.*``) for so many ranks."""
    dense = {name: own for name, (ranks, own) in LAYOUTS.items() if ranks == world_size}
    experts = {name: own for name, (ranks, own) in EXPERTS.items() if ranks == world_size}
    found = [("qwen3", name, own) for name, own in dense.items()]
    found += [("experts", name, own) for name, own in experts.items() if "recompute" not in name]
    if world_size == 2:
        found += [("qwen3, tied", "PP2", dense["PP2"]), ("qwen2, 2 groups", "TP2", dense["TP2"])]
    return found


@contextmanager
def policy_of(folder: Path, own: dict[str, Any]) -> Iterator[Any]:
    from megatron_spear.config.schema import OptimizerSection, PolicySection
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy

    section = PolicySection(**own)
    ctx = parallel.initialize(section, seed=0)
    try:
        yield MegatronPolicy.from_hf(folder, section, OptimizerSection(), 10, ctx)
    finally:
        parallel.destroy(keep_world=True)


def compare_slices(folders: dict[str, Path], world_size: int) -> list[str]:
    """Every rank's slices against the whole tensors: what differs."""
    import torch.distributed as dist

    wrong = []
    for model, layout, own in jobs(world_size):
        with policy_of(folders[model], own) as policy:
            whole = {n: t.clone() if t is not None else t for n, t in policy.export_weights()}
            box = [whole]
            dist.broadcast_object_list(box, src=0, group=policy.ctx.control)
            slices = policy.local_slices()
            wrong += [
                f"{model} {layout} {found.name}"
                for found in slices
                if not torch.equal(
                    torch.cat(found.blocks()),
                    box[0][found.name].narrow(found.axis, found.start, found.stop - found.start),
                )
            ]
            wrong += _not_as_planned(policy, slices, own)
    return wrong


def _not_as_planned(policy: Any, slices: Any, own: dict[str, Any]) -> list[str]:
    """Whether the slices are those that ``weight_sync.layouts`` says the rank holds."""
    from megatron_spear.conversion.families import weight_table
    from megatron_spear.weight_sync.layouts import layout_of, training_holdings

    layout = layout_of(policy.ctx, virtual=own.get("virtual_pipeline", 1))
    planned = {
        (name, held.axis, held.start, held.stop)
        for item in weight_table(policy.shape)
        if not item.tied
        for number, name in enumerate(item.sources)
        for held in training_holdings(item, number, policy.shape, layout)
        if policy.ctx.rank in held.ranks
    }
    held = {(found.name, found.axis, found.start, found.stop) for found in slices}
    return [f"rank {policy.ctx.rank}: {difference}" for difference in planned ^ held]


@cache
def folders(root: Path) -> dict[str, Path]:
    made = {}
    for name, (architecture, changes) in MODELS.items():
        made[name] = root / name.replace(" ", "_")
        tiny_hf_folder(made[name], architecture, num_hidden_layers=4, **changes)
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_are_those_of_the_whole_tensors(models: dict[str, Path], world_size: int) -> None:
    told = run_ranks(compare_slices, world_size, models, world_size, timeout_s=240)
    assert [line for rank in told for line in rank] == []


def new_weights(policy: Any, update: int) -> None:
    """Other weights, the same on every layout."""
    with torch.no_grad():
        for parameter in policy._parameters():
            parameter.mul_(1.0 + update / 8)


def publish(
    models: dict[str, Path], world_size: int, engine: dict[str, Any], updates: int = 2
) -> list[str]:
    """Every layout's weights to engines: what their ranks hold that their loaders would not."""
    wrong = []
    processes: list[Any] = []
    for model, layout, own in jobs(world_size):
        with (
            policy_of(models[model], own) as policy,
            engines_of(policy, own, processes=processes, **engine) as (transport, servers),
        ):
            for update in range(1, updates + 1):
                new_weights(policy, update)
                transport.publish(update)
                whole = {n: t.clone() for n, t in policy.export_weights() if t is not None}
                told = differences(servers, whole, policy.shape, engine, update)
                wrong += [f"{model} {layout} update {update}: {line}" for line in told]
    for server in processes:
        server.close()
    return wrong


@contextmanager
def engines_of(
    policy: Any,
    own: dict[str, Any],
    *,
    tensor: int = 1,
    replicas: int = 1,
    groups: int = 1,
    precision: str = "model",
    deadline_s: float = DEADLINE_S,
    bucket_bytes: int = BUCKET,
    processes: list[Any],
) -> Iterator[tuple[Any, Any]]:
    """A transport and, on the controller, servers with ranks of this policy's shape.

    ``processes`` are the servers of another shape to go on with; what is made is put there.
    """
    from megatron_spear.testing.engine_servers import RankServer, Servers
    from megatron_spear.weight_sync.layouts import layout_of
    from megatron_spear.weight_sync.sharded.transport import Sharded

    whole = {n: t for n, t in policy.export_weights() if t is not None}
    servers = None
    groups = groups if policy.shape.num_experts else 1
    if policy.ctx.is_controller:
        cut = {"size": tensor, "expert_groups": groups, "fp8": precision == "fp8"}
        ranks = [rank_parameters(whole, policy.shape, rank, **cut) for rank in range(tensor)]
        for number in range(len(processes), replicas):
            processes.append(RankServer(f"engine {number}", ranks, deadline_s))
        for server in processes:
            server.build(ranks)
        servers = Servers(processes)
    transport = Sharded(
        source=policy,
        ranks=policy.ctx,
        servers=servers,
        model=policy.shape,
        training=layout_of(policy.ctx, virtual=own.get("virtual_pipeline", 1)),
        host="127.0.0.1",
        bucket_bytes=bucket_bytes,
        precision=precision,
        deadline_s=deadline_s,
        expert=groups,
    )
    try:
        yield transport, servers
    finally:
        transport.close()


def rank_parameters(whole: Any, shape: Any, rank: int, **cut: Any) -> dict[str, Any]:
    from megatron_spear.testing.engine_shards import engine_parameters

    own = engine_parameters(whole, shape, rank=rank, **cut)
    return {name: (tuple(value.shape), value.dtype) for name, value in own.items()}


def differences(
    servers: Any, whole: Any, shape: Any, engine: dict[str, Any], version: int
) -> list[str]:
    """Parameters that are not what the engine's loaders make of the whole tensors."""
    from megatron_spear.testing.engine_shards import engine_parameters

    wrong = []
    size, fp8 = engine.get("tensor", 1), engine.get("precision") == "fp8"
    groups = engine.get("groups", 1) if shape.num_experts else 1
    for server in servers.servers if servers else ():
        if servers.versions.get(server.name) != version or server.version != version:
            wrong.append(f"{server.name} was not admitted: {servers.out}")
        for rank in range(size):
            expected = engine_parameters(
                whole, shape, rank=rank, size=size, expert_groups=groups, fp8=fp8
            )
            found = server.weights(rank)
            assert set(found) == set(expected)
            wrong += [
                f"{server.name} rank {rank} {name}"
                for name, value in expected.items()
                if not torch.equal(found[name].view(torch.uint8), value.view(torch.uint8))
            ]
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "engine", [{"tensor": 2, "groups": 2}, {"tensor": 1, "replicas": 2}], ids=str
)
def test_engines_hold_what_their_loaders_would(
    models: dict[str, Path], world_size: int, engine: dict[str, Any]
) -> None:
    told = run_ranks(publish, world_size, models, world_size, engine, timeout_s=280)
    assert [line for rank in told for line in rank] == []


class _Cut:
    """Weights of any shape on two ranks, others at each update."""

    def __init__(self, shape: Any, layout: Any, rank: int) -> None:
        self._shape, self._layout, self._rank, self.update = shape, layout, rank, 0

    @property
    def whole(self) -> dict[str, torch.Tensor]:
        from megatron_spear.testing.training_ranks import random_weights

        return random_weights(self._shape, seed=self.update)

    def export_weights(self) -> Iterator[tuple[str, Any]]:
        yield from self.whole.items()

    def local_slices(self) -> Any:
        from megatron_spear.testing.training_ranks import rank_slices

        self.update += 1
        return rank_slices(self.whole, self._shape, self._layout, self._rank)


def publish_cut(changes: dict[str, Any], layout: Any, engine: dict[str, Any]) -> list[str]:
    import os
    from types import SimpleNamespace

    import torch.distributed as dist

    from megatron_spear.conversion.shape import ModelShape

    shape = ModelShape(
        family="llama", num_layers=2, hidden_size=256, ffn_size=512, num_heads=4, num_groups=2,
        head_dim=128, vocab_size=500, norm_eps=1e-6, rope_theta=1e4, **changes,
    )  # fmt: skip
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    source = _Cut(shape, layout, rank)
    source.shape, source.ctx = shape, SimpleNamespace(  # type: ignore[attr-defined]
        rank=rank, world_size=2, device=torch.device("cpu"), control=dist.group.WORLD,
        is_controller=rank == 0, tensor_size=layout.tensor, context_size=layout.context,
        data_size=layout.data, pipeline_size=layout.pipeline, expert_size=1,
    )  # fmt: skip
    wrong = []
    processes: list[Any] = []
    parts = engines_of(source, {}, bucket_bytes=200_000, processes=processes, **engine)
    with parts as (transport, servers):
        for update in (1, 2):
            transport.publish(update)
            wrong += differences(servers, source.whole, shape, engine, update)
    for server in processes:
        server.close()
    return wrong


@pytest.mark.parametrize(
    ("layout", "engine"),
    [
        ({"tensor": 2}, {"tensor": 4}),  # fewer keys and values than ranks
        ({"tensor": 2}, {"tensor": 2, "precision": "fp8"}),
        ({"data": 2}, {"tensor": 1, "replicas": 2, "precision": "fp8"}),
    ],
    ids=str,
)
def test_other_engines(layout: dict[str, int], engine: dict[str, Any]) -> None:
    from megatron_spear.weight_sync.layouts import TrainingLayout

    told = run_ranks(publish_cut, 2, {}, TrainingLayout(**layout), engine, timeout_s=200)
    assert [line for rank in told for line in rank] == []
