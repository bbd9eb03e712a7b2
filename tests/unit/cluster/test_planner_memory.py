"""Memory by part, what is refused and what helps, on models of which only the shape is known."""

from typing import Any

import pytest

from megatron_spear.cluster.planner.engine_memory import cache_bytes, engine_memory
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.memory import (
    ALL_TO_ALL_BYTES,
    CONTEXT_BYTES,
    GROUP_BYTES,
    PROCESS_BYTES,
    training_memory,
)
from megatron_spear.cluster.planner.models import planned_model
from megatron_spear.cluster.planner.refusal import refusals, require_fits, what_helps
from megatron_spear.cluster.planner.search import best_layouts
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.sizes import model_parameters
from megatron_spear.errors import ConfigError

SERVERS = (
    "rollout.engine=sglang",
    "rollout.max_context=8192",
    "rollout.max_slots=256",
    "cluster.engine_nodes=1",
    "cluster.servers.program=sglang",
    "cluster.servers.count=2",
    "cluster.servers.tensor_parallel=4",
)
COLOCATED = (*SERVERS, "rollout.colocated=true", "cluster.engine_nodes=0")


def config_of(preset: str, gpus: int, *settings: str) -> RunConfig:
    """The preset's layout on so many H100 in nodes of 8, with servers."""
    nodes = [f"preset={preset}", "cluster.gpus_per_node=8", f"cluster.trainer_nodes={gpus // 8}"]
    return load_config(None, [*nodes, *SERVERS, *settings])


def job_of(preset: str, gpus: int, *settings: str) -> Job:
    config = config_of(preset, gpus, *settings)
    return Job.of_config(config, planned_model(config)[1])


def on_cpu(**settings: Any) -> Job:
    """The tiny model on one CPU rank."""
    config = RunConfig.model_validate(settings)
    return Job.of_config(config, planned_model(config)[1])


def test_32b_with_adam_on_a_node_is_refused_by_the_gigabyte() -> None:
    job = job_of("qwen2.5-32b-16gpus", 8)
    states = 18 * model_parameters(job.shape).total / 8
    (line,) = refusals(job)
    memory = training_memory(job)
    assert memory.total > states > 73e9 and memory.short == memory.total - 80 * 10**9
    assert line.startswith("32.8 B parameters on 8 x h100 (80.0 GB): the fullest rank needs ")
    assert f"short by {memory.short / 1e9:.1f} GB; largest: optimizer 49.2 GB" in line
    assert "policy.optimizer_offload=1.0 (" in line and "16 GPUs that train (" in line


def test_no_layout_of_a_node_holds_32b_with_adam_without_offload() -> None:
    assert not best_layouts(job_of("qwen2.5-32b-16gpus", 8))
    assert best_layouts(job_of("qwen2.5-32b-16gpus", 8, "policy.optimizer_offload=1.0"))
    assert best_layouts(job_of("qwen2.5-32b-16gpus", 16))


@pytest.mark.parametrize(
    ("gpus", "settings"), [(8, ("policy.optimizer_offload=1.0",)), (16, ()), (512, ())]
)
def test_32b_fits_with_offload_or_more_gpus(gpus: int, settings: tuple[str, ...]) -> None:
    config = config_of("qwen2.5-32b-16gpus", gpus, *settings)
    require_fits(config)
    assert not list(refusals(Job.of_config(config, planned_model(config)[1])))


def test_what_helps_is_true() -> None:
    """Each change that is named makes it fit, with the bytes that it says."""
    named = dict(what_helps(job_of("qwen2.5-32b-16gpus", 8)))
    assert set(named) == {"policy.optimizer_offload=1.0", "16 GPUs that train"}
    offloaded = job_of("qwen2.5-32b-16gpus", 8, "policy.optimizer_offload=1.0")
    assert training_memory(offloaded).total == named["policy.optimizer_offload=1.0"]
    assert training_memory(job_of("qwen2.5-32b-16gpus", 16)).total == named["16 GPUs that train"]
    long = job_of("qwen2.5-7b-32gpus", 32, "policy.tokens_per_microbatch=65536")
    assert training_memory(long).short
    assert {"policy.recompute=full", "policy.tokens_per_microbatch=8192"} <= set(
        dict(what_helps(long))
    )


def test_require_fits_names_all_that_is_wrong() -> None:
    small = "cluster.servers.tensor_parallel=1", "cluster.servers.memory_fraction=0.5"
    with pytest.raises(ConfigError, match="this cannot fit") as told:
        require_fits(config_of("qwen2.5-32b-16gpus", 8, *small))
    first, second = str(told.value).splitlines()[1:]
    assert "fullest rank" in first and "an engine server of 1 GPU(s) is short by" in second
    impossible = "policy.tensor_parallel=3", "policy.sequence_parallel=false"
    with pytest.raises(ConfigError, match="num_attention_heads=40 is not a multiple"):
        require_fits(config_of("qwen2.5-32b-16gpus", 8, *impossible))


def test_a_run_on_cpus_is_not_refused_for_memory() -> None:
    require_fits(load_config(None, ["policy.tokens_per_microbatch=100000000"]))


def test_what_is_no_tensor() -> None:
    """Groups of ranks with buffers: tensor, data, and one for the weights' way to the engines."""
    memory = training_memory(job_of("qwen2.5-32b-16gpus", 16))
    assert memory.parts["CUDA and NCCL"] == CONTEXT_BYTES + 3 * GROUP_BYTES
    experts = training_memory(job_of("qwen3-30b-a3b-32gpus", 32))
    assert experts.parts["CUDA and NCCL"] == CONTEXT_BYTES + 3 * GROUP_BYTES + ALL_TO_ALL_BYTES
    assert memory.parts["lost to the allocator"] == 6 * 10**9


def test_servers_on_the_gpus_that_train_take_their_share_in_the_update() -> None:
    job = job_of("qwen2.5-7b-8gpus", 8, *COLOCATED[-2:], "cluster.servers.memory_fraction=0.5")
    memory = training_memory(job)
    assert memory.moment == "the weight update"
    assert memory.parts["engine on this GPU"] == 40 * 10**9
    assert memory.parts["buckets"] == 2 * (512 << 20)
    assert memory.parts["a gathered tensor"] == 2 * 2 * 152064 * 3584
    assert memory.parts["a paused server"] == CONTEXT_BYTES + GROUP_BYTES, "of several GPUs"
    alone = job_of("qwen2.5-7b-8gpus", 8, *COLOCATED[-2:], "cluster.servers.tensor_parallel=1")
    assert training_memory(alone).parts["a paused server"] == CONTEXT_BYTES
    sharded = job_of(
        "qwen2.5-7b-8gpus", 8, *COLOCATED[-2:], "cluster.servers.memory_fraction=0.5",
        "weight_sync.transport=sharded",
    )  # fmt: skip
    assert "a gathered tensor" not in training_memory(sharded).parts


def test_a_reference_is_on_the_host_and_comes_for_its_pass() -> None:
    plain = training_memory(job_of("qwen2.5-7b-32gpus", 32))
    other = training_memory(job_of("qwen2.5-7b-32gpus", 32, "algorithm.kl.coef=0.1"))
    assert plain.host == 0 and other.host == other.parts["weights"]
    assert other.total == plain.total  # the training pass needs more than the reference's
    small = ("policy.tokens_per_microbatch=8192", "policy.recompute=full")
    bound = training_memory(job_of("qwen2.5-32b-512gpus", 512, *small, "algorithm.kl.coef=0.1"))
    assert bound.moment == "the reference's pass"
    assert bound.parts["reference weights"] == bound.parts["weights"]


def test_a_second_gradient_is_held_where_norms_are_told_apart() -> None:
    memory = training_memory(job_of("qwen2.5-7b-32gpus", 32, "replay.gradient_norms=true"))
    assert memory.parts["second gradient"] == memory.parts["gradients"]


def test_on_a_cpu_all_is_in_one_memory() -> None:
    job = on_cpu(algorithm={"kl": {"coef": 0.1}}, policy={"distributed_optimizer": True,
                 "optimizer_offload": 1.0})  # fmt: skip
    memory, count = training_memory(job), model_parameters(job.shape).total
    assert memory.parts["weights"] == memory.parts["reference weights"] == 4 * count
    assert memory.parts["offloaded optimizer"] == 16 * count and "optimizer" not in memory.parts
    cache = 64 * 512 * 4 * 2 * 4 * 2 * 32  # slots, context, bytes, both, layers, groups, head size
    assert memory.parts["embedded engine's cache"] == cache
    assert memory.parts["Python and libraries"] == PROCESS_BYTES and memory.host == 0


def test_the_cache_of_an_engine_by_hand() -> None:
    """Qwen2.5-32B over 4 GPUs: 85 % of 80 GB less a quarter of the weights; 2 of 8 groups each."""
    job = job_of("qwen2.5-32b-16gpus", 16)
    engine = engine_memory(job)
    a_token = 2 * 2 * 64 * 2 * 128
    assert engine.a_token == cache_bytes(job.shape, 4) == a_token
    assert engine.weights == 2 * 32_763_876_352 // 4
    assert engine.tokens == (68 * 10**9 - engine.weights) // a_token
    assert engine.contexts == engine.tokens // 8192 and engine.fits and engine.short == 0
    assert engine.wanted == 64 // 2  # 8 prompts of 8 attempts over two servers
    assert cache_bytes(job.shape, 16) == cache_bytes(job.shape, 8)  # a group has a copy a rank


def test_fp8_halves_an_engines_linear_layers() -> None:
    bf16 = engine_memory(job_of("qwen2.5-32b-16gpus", 16)).weights
    fp8 = engine_memory(job_of("qwen2.5-32b-16gpus", 16, "weight_sync.precision=fp8")).weights
    assert bf16 / 2 < fp8 < 0.55 * bf16
