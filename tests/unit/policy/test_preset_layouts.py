"""Every preset, proven without weights: its ranks hold each Hugging Face parameter exactly once,
real Megatron models of each kind of rank have the shapes that the weight tables give, and the
fullest rank fits its GPU.
"""

from collections.abc import Iterable
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_spear.cluster.planner.memory import fullest_rank
from megatron_spear.config.presets.layouts import GPUS_PER_NODE, MAX_RANK_BYTES, PRESETS, Preset
from megatron_spear.config.presets.models import MODELS
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import Shape, place_of
from megatron_spear.conversion.shape import ModelShape, model_shape
from megatron_spear.policy.parallel import Place, check_layout
from megatron_spear.policy.weights import local_shapes
from megatron_spear.testing.ranks import run_ranks

each_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
TIED = Preset(
    model="qwen2.5-1.5b",
    gpus=16,
    policy={"tensor_parallel": 2, "pipeline_parallel": 4, "sequence_parallel": True},
    why="no preset, but the only layout here with a tied embedding on two stages",
)
LAYOUTS = (*PRESETS.values(), TIED)
each_layout = pytest.mark.parametrize("preset", LAYOUTS, ids=lambda p: p.name)


@cache
def hf_config(model: str) -> Any:
    return AutoConfig.for_model(**MODELS[model].config)


@cache
def shape_of(model: str) -> ModelShape:
    return model_shape(hf_config(model))


@cache
def hf_shapes(model: str) -> dict[str, Shape]:
    """Name and shape of every tensor of transformers' own model, as checkpoints have them."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(hf_config(model))
    shapes: dict[str, Shape] = {}
    for name, parameter in built.named_parameters():
        layer, experts, part = name.partition("experts.")
        if not experts:
            shapes[name] = tuple(parameter.shape)
            continue
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
        number, rows, columns = parameter.shape  # all experts' in one; checkpoints have each apart
        for expert in range(number):
            for own in parts:
                shapes[f"{layer}experts.{expert}.{own}.weight"] = (rows // len(parts), columns)
    return shapes


def rank_of(policy: PolicySection, world_size: int, number: int, stage: int) -> int:
    """The global rank: tensor parallel counts first, then data, then pipeline."""
    return number + stage * (world_size // policy.pipeline_parallel)


def kinds_of_ranks(preset: Preset) -> list[tuple[int, int]]:
    """(rank in the stage, stage): first, middle and last stage, first and last slice of each."""
    policy = PolicySection(**preset.policy)
    last = policy.pipeline_parallel - 1
    slices = {0, max(policy.tensor_parallel, policy.expert_parallel) - 1}
    return [(part, stage) for stage in sorted({0, last // 2, last}) for part in sorted(slices)]


def place(policy: PolicySection, number: int, stage: int) -> Place:
    """That of the stage's rank ``number``."""
    return Place(
        tensor_rank=number % policy.tensor_parallel,
        tensor_size=policy.tensor_parallel,
        pipeline_rank=stage,
        pipeline_size=policy.pipeline_parallel,
        expert_rank=number % policy.expert_parallel,
        expert_size=policy.expert_parallel,
    )


def build_on_meta(
    jobs: Iterable[tuple[str, int, dict[str, Any], ModelShape, int]],
) -> dict[tuple[str, int], tuple[Any, dict[str, Shape]]]:
    """(preset, rank) -> (where it stands, parameter shapes of the Megatron model it builds)."""
    from megatron_spear.policy.model import PackedModel
    from megatron_spear.testing.fake_world import fake_rank

    built = {}
    for name, world_size, settings, shape, rank in jobs:
        policy = PolicySection(**settings)
        with fake_rank(policy, rank, world_size) as ctx:
            model = PackedModel(shape, policy, ctx)
            slices = (ctx.tensor_rank, ctx.expert_rank)
            stands = (ctx.rank, ctx.world_size, *slices, ctx.pipeline_rank, ctx.data_size)
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            assert all(p.is_meta for p in model.parameters())
        built[name, rank] = stands, shapes
    return built


@pytest.fixture(scope="module")
def megatron() -> dict[tuple[str, int], tuple[Any, dict[str, Shape]]]:
    """Models of all kinds of ranks of all layouts, built in a process of their own."""
    jobs = []
    for preset in LAYOUTS:
        policy = PolicySection(**preset.policy)
        for part, stage in kinds_of_ranks(preset):
            rank = rank_of(policy, preset.gpus, part, stage)
            shape = shape_of(preset.model)
            jobs.append((preset.name, preset.gpus, dict(preset.policy), shape, rank))
    (built,) = run_ranks(build_on_meta, 1, jobs, timeout_s=240)
    return built


@pytest.mark.parametrize("model", MODELS)
def test_published_models_have_their_published_size(model: str) -> None:
    assert sum(map(prod, hf_shapes(model).values())) == MODELS[model].num_parameters


@pytest.mark.parametrize("model", sorted({preset.model for preset in PRESETS.values()}))
def test_weight_tables_name_every_hugging_face_tensor_once(model: str) -> None:
    owned = [item for item in weight_table(shape_of(model)) if not item.tied]
    sources = [pair for item in owned for pair in zip(item.sources, item.shapes, strict=True)]
    assert len(sources) == len(dict(sources))
    assert dict(sources) == hf_shapes(model)


def test_the_positions_of_published_models() -> None:
    assert shape_of("qwen2.5-7b").rope_theta == shape_of("qwen3-32b").rope_theta == 1e6
    llama = shape_of("llama-3.1-70b")
    assert (llama.rope_theta, llama.rope["rope_type"], llama.rope["factor"]) == (5e5, "llama3", 8.0)


@each_preset
def test_layout_is_possible_and_tensor_and_experts_stay_in_a_node(preset: Preset) -> None:
    policy = PolicySection(**preset.policy)
    check_layout(policy, hf_config(preset.model), preset.gpus)
    assert GPUS_PER_NODE % policy.tensor_parallel == 0
    assert GPUS_PER_NODE % policy.expert_parallel == 0
    assert policy.sequence_parallel == (policy.tensor_parallel > 1)
    assert policy.precision == "bf16"
    replicas = preset.gpus // (policy.tensor_parallel * policy.pipeline_parallel)
    shared = (policy.distributed_optimizer, policy.overlap_grad_reduce, policy.overlap_param_gather)
    assert replicas > 1 and all(shared)
    assert policy.tokens_per_microbatch >= 16384


@each_layout
def test_ranks_together_hold_every_parameter_once(preset: Preset) -> None:
    """Shards of all tensor ranks, put together, are the Hugging Face tensors; nothing is left."""
    policy, shape = PolicySection(**preset.policy), shape_of(preset.model)
    stages, size = policy.pipeline_parallel, policy.tensor_parallel
    numbers = range(max(size, policy.expert_parallel))  # all slices and all experts are among them
    held = {
        stage: [local_shapes(shape, place(policy, number, stage)) for number in numbers]
        for stage in range(stages)
    }
    covered: dict[str, Shape] = {}
    for item in weight_table(shape):
        stage, _ = place_of(item, shape.num_layers, stages)
        ranks, first_expert = held[stage], 0
        if item.expert is not None:  # whole, on one of the ranks
            per_rank = shape.num_experts // policy.expert_parallel
            holder, first_expert = item.expert // per_rank, item.expert // per_rank * per_rank
            ranks = [ranks[holder]]
        name = item.local_name(shape.num_layers // stages * stage, first_expert)
        if item.tied and stages == 1:
            assert name not in ranks[0]
            continue
        parts = [torch.empty(rank.pop(name), device="meta") for rank in ranks]
        tensors = item.to_hf(parts[0] if item.expert is not None else item.unshard(parts[:size]))
        if item.tied:  # a copy on the last stage of what the first one owns
            assert covered[item.sources[0]] == tuple(tensors[0].shape)
            continue
        for source, tensor in zip(item.sources, tensors, strict=True):
            assert source not in covered
            covered[source] = tuple(tensor.shape)
    assert not any(rank for ranks in held.values() for rank in ranks)
    assert covered == hf_shapes(preset.model)
    assert sum(map(prod, covered.values())) == preset.published.num_parameters


@each_layout
def test_megatron_builds_what_the_tables_say(preset: Preset, megatron: dict[Any, Any]) -> None:
    policy = PolicySection(**preset.policy)
    replicas = preset.gpus // (policy.tensor_parallel * policy.pipeline_parallel)
    for part, stage in kinds_of_ranks(preset):
        rank = rank_of(policy, preset.gpus, part, stage)
        stands, shapes = megatron[preset.name, rank]
        slices = (part % policy.tensor_parallel, part % policy.expert_parallel)
        assert stands == (rank, preset.gpus, *slices, stage, replicas)
        assert shapes == local_shapes(shape_of(preset.model), place(policy, part, stage))


@each_preset
def test_the_fullest_rank_fits_its_gpu(preset: Preset) -> None:
    needs = fullest_rank(shape_of(preset.model), PolicySection(**preset.policy), preset.gpus)
    assert needs.total < MAX_RANK_BYTES


@pytest.mark.parametrize(
    ("like", "gpus", "changes"),
    [
        ("qwen2.5-1.5b-8gpus", 8, {"tokens_per_microbatch": 32768}),
        ("qwen2.5-7b-8gpus", 8, {"tensor_parallel": 1}),
        ("qwen2.5-7b-32gpus", 32, {"tensor_parallel": 2}),
        ("qwen3-8b-8gpus", 8, {"tensor_parallel": 1}),
        ("qwen3-8b-32gpus", 32, {"tensor_parallel": 2}),
        ("qwen2.5-32b-16gpus", 8, {}),
        ("qwen2.5-32b-16gpus", 16, {"distributed_optimizer": False}),
        ("qwen3-32b-128gpus", 128, {"recompute": "none"}),
        ("qwen3-30b-a3b-16gpus", 8, {}),
        ("qwen3-30b-a3b-512gpus", 512, {"pipeline_parallel": 1}),
        ("llama-3.1-70b-32gpus", 16, {}),
        ("llama-3.1-70b-32gpus", 32, {"pipeline_parallel": 1}),
    ],
)
def test_what_the_presets_leave_out_is_too_large(
    like: str, gpus: int, changes: dict[str, Any]
) -> None:
    preset = PRESETS[like]
    policy = PolicySection(**preset.policy | changes)
    assert fullest_rank(shape_of(preset.model), policy, gpus).total > MAX_RANK_BYTES
