"""Who does what on which node, and settings that do not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spear.cluster.roles import (
    first_server_gpu,
    require_settings,
    role_problems,
    roles_of,
)
from megatron_spear.config.cluster import ClusterSection
from megatron_spear.config.load import load_config
from megatron_spear.errors import ConfigError


def cluster(**settings):
    return ClusterSection.model_validate(settings)


def test_engine_nodes_come_after_the_trainer_nodes_and_have_all_servers():
    section = cluster(trainer_nodes=2, engine_nodes=2, servers={"count": 3}, gpus_per_node=8)
    roles = [roles_of(section, node) for node in range(4)]
    assert [r.num_ranks for r in roles] == [8, 8, 0, 0]
    assert [list(r.engines) for r in roles] == [[], [], [0, 1], [2]]


def test_without_engine_nodes_trainer_nodes_share_servers_and_workers():
    section = cluster(trainer_nodes=2, servers={"count": 2}, env_workers=3, ranks_per_node=2)
    roles = [roles_of(section, node) for node in range(2)]
    assert [list(r.engines) for r in roles] == [[0], [1]]
    assert [list(r.environments) for r in roles] == [[0, 1], [2]]
    assert [r.num_ranks for r in roles] == [2, 2]


@given(
    trainers=st.integers(1, 5),
    engines=st.integers(0, 5),
    count=st.integers(0, 40),
    workers=st.integers(0, 40),
)
def test_every_server_and_worker_is_on_one_node_and_the_spread_is_even(
    trainers, engines, count, workers
):
    section = cluster(
        trainer_nodes=trainers,
        engine_nodes=engines,
        servers={"count": count},
        env_workers=workers,
    )
    roles = [roles_of(section, node) for node in range(section.num_nodes)]
    for name, total in (("engines", count), ("environments", workers)):
        parts = [getattr(r, name) for r in roles]
        assert [i for part in parts for i in part] == list(range(total))
        sizes = [len(part) for part in parts[trainers if engines else 0 :]]
        assert max(sizes) - min(sizes) <= 1


def test_servers_begin_after_the_ranks_gpus_unless_they_share_them():
    assert first_server_gpu(cluster(gpus_per_node=8, ranks_per_node=4), colocated=False) == 4
    assert first_server_gpu(cluster(gpus_per_node=8), colocated=True) == 0
    assert first_server_gpu(cluster(gpus_per_node=8, engine_nodes=1), colocated=False) == 0


SERVERS = ("rollout.engine=sglang", "cluster.servers.count=2")
SHARED_GPUS = (*SERVERS, "cluster.gpus_per_node=8", "rollout.colocated=true")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("cluster.gpus_per_node=4", "cluster.ranks_per_node=8"), "a GPU of its own"),
        (("cluster.engine_nodes=2",), "nothing to do"),
        (("cluster.servers.count=1",), "goes with rollout.engine=sglang, and it is embedded"),
        ((*SERVERS, "cluster.servers.program=vllm"), "goes with rollout.engine=vllm"),
        ((*SERVERS, "rollout.servers=[http://a:1]"), "names 1 others"),
        ((*SERVERS, "cluster.servers.tensor_parallel=2"), "has one rank"),
        ((*SERVERS, "run.hang_limit_s=900"), "is not below run.hang_limit_s=900"),
        ((*SERVERS, "rollout.colocated=true", "cluster.engine_nodes=1"), "puts them elsewhere"),
        ((*SERVERS, "cluster.gpus_per_node=8"), "need 2 GPUs a node"),
        ((*SERVERS, "cluster.gpus_per_node=8"), "of which training has 8"),
        (
            (
                *SERVERS,
                "cluster.servers.program=sglang",
                "weight_sync.precision=fp8",
                "weight_sync.transport=disk",
            ),
            "starts from an FP8 folder only",
        ),
        ((*SHARED_GPUS, "weight_sync.transport=auto"), "transport=auto: NCCL has no group"),
        ((*SHARED_GPUS, "weight_sync.transport=sharded"), "set weight_sync.transport=disk"),
        ((*SHARED_GPUS, "weight_sync.transport=ipc"), "only the first sees the GPU of rank 0"),
    ],
)
def test_roles_that_do_not_fit_are_named(settings, words):
    problems = list(role_problems(load_config(None, settings)))
    assert len(problems) == 1
    assert words in problems[0]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        SERVERS,
        (*SERVERS, "cluster.engine_nodes=2", "cluster.gpus_per_node=8"),
        (*SERVERS, "cluster.gpus_per_node=8", "cluster.ranks_per_node=6"),
        (*SHARED_GPUS, "weight_sync.transport=disk"),
        (*SHARED_GPUS, "weight_sync.transport=ipc", "cluster.servers.count=1"),
        (*SERVERS, "rollout.colocated=true"),
    ],
)
def test_roles_that_fit(settings):
    assert list(role_problems(load_config(None, settings))) == []


def test_settings_are_held_to_the_machines_gpus():
    on_gpus = ("cluster.gpus_per_node=8", "policy.tensor_parallel=2", "policy.pipeline_parallel=2")
    require_settings(load_config(None, on_gpus[1:]))
    require_settings(load_config(None, on_gpus))
    with pytest.raises(ConfigError, match="world size 6 is not a multiple"):
        require_settings(load_config(None, [*on_gpus, "cluster.ranks_per_node=6"]))
    with pytest.raises(ConfigError, match="need 2 GPUs a node"):
        require_settings(load_config(None, [*SERVERS, "cluster.gpus_per_node=8"]))
