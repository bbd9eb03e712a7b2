"""Layouts that do not fit are refused with all reasons; learning-rate schedules by hand."""

import pytest
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import place_of
from megatron_spear.conversion.shape import model_shape
from megatron_spear.errors import ConfigError
from megatron_spear.policy.optimizer import learning_rate
from megatron_spear.policy.parallel import check_layout

MODEL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 90,
}


def section(**changes: object) -> PolicySection:
    return PolicySection(**changes)


def test_fitting_layouts_pass() -> None:
    check_layout(section(), Qwen3Config(**MODEL), 1)
    check_layout(
        section(tensor_parallel=2, context_parallel=3, pipeline_parallel=2, sequence_parallel=True),
        Qwen3Config(**MODEL),
        24,
    )


def test_world_size() -> None:
    with pytest.raises(
        ConfigError, match=r"world size 8 is not a multiple of .* = 3 x 1 x 2; start 6 ranks"
    ):
        check_layout(section(tensor_parallel=3, pipeline_parallel=2), Qwen3Config(**MODEL), 8)
    with pytest.raises(ConfigError, match=r"world size 6 is not .* = 2 x 2 x 1; start 4 ranks"):
        check_layout(section(tensor_parallel=2, context_parallel=2), Qwen3Config(**MODEL), 6)
    with pytest.raises(ConfigError, match="sequence_parallel"):
        check_layout(section(sequence_parallel=True), Qwen3Config(**MODEL), 1)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_layout(section(tensor_parallel=4, pipeline_parallel=3), LlamaConfig(**MODEL), 12)
    assert str(error.value).splitlines()[1:] == [
        "  the model's num_key_value_heads=2 is not a multiple of policy.tensor_parallel=4; "
        "choose a divisor",
        "  the model's intermediate_size=90 is not a multiple of policy.tensor_parallel=4; "
        "choose a divisor",
        "  the model's num_hidden_layers=4 is not a multiple of policy.pipeline_parallel=3; "
        "choose a divisor",
    ]


def test_interleaved_pipelines() -> None:
    check_layout(section(pipeline_parallel=2, virtual_pipeline=2), Qwen3Config(**MODEL), 2)
    with pytest.raises(ConfigError, match=r"virtual_pipeline=2 cuts .*parallel=1 has none"):
        check_layout(section(virtual_pipeline=2), Qwen3Config(**MODEL), 1)
    with pytest.raises(
        ConfigError,
        match=r"num_hidden_layers=4 is not a multiple of policy\.pipeline_parallel=2 x "
        r"policy\.virtual_pipeline=3; choose a divisor",
    ):
        check_layout(section(pipeline_parallel=2, virtual_pipeline=3), Qwen3Config(**MODEL), 2)


@pytest.mark.parametrize("missing", ["distributed_optimizer", "overlap_grad_reduce"])
def test_overlapped_gathering_needs_something_to_gather(missing: str) -> None:
    overlapped = {
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    check_layout(section(**overlapped), Qwen3Config(**MODEL), 2)
    with pytest.raises(ConfigError, match=f"overlap_param_gather=true .* policy.{missing}=true"):
        check_layout(section(**overlapped | {missing: False}), Qwen3Config(**MODEL), 2)


@pytest.mark.parametrize(
    ("num_chunks", "places"),
    [
        (1, [(0, 0), (0, 0), (0, 0), (0, 0), (1, 0), (1, 0), (1, 0), (1, 0)]),
        (2, [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]),
        (4, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]),
    ],
)
def test_where_weights_are(num_chunks: int, places: list[tuple[int, int]]) -> None:
    shape = model_shape(Qwen3Config(**MODEL | {"num_hidden_layers": 8}))
    found: dict[object, set[tuple[int, int]]] = {}
    for item in weight_table(shape):
        key = item.layer if item.stage == "layer" else item.stage
        found.setdefault(key, set()).add(place_of(item, shape.num_layers, 2, num_chunks))
    ends = {"first": {(0, 0)}, "last": {(1, num_chunks - 1)}}
    assert found == {number: {place} for number, place in enumerate(places)} | ends


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ({"expert_parallel": 2}, 2),
        ({"expert_parallel": 4, "tensor_parallel": 2, "sequence_parallel": True}, 4),
        ({"expert_parallel": 2, "pipeline_parallel": 2}, 4),
        ({"expert_parallel": 4, "context_parallel": 4}, 4),
    ],
)
def test_fitting_layouts_of_experts_pass(layout: dict, world_size: int) -> None:
    """``intermediate_size`` is of no layer there, so nothing has to divide it."""
    experts = Qwen3MoeConfig(**MODEL | {"intermediate_size": 91}, num_experts=8)
    check_layout(section(**layout), experts, world_size)


@pytest.mark.parametrize(
    ("layout", "world_size", "told"),
    [
        ({"expert_parallel": 2}, 3, "a pipeline stage of 3 ranks"),
        ({"expert_parallel": 4, "pipeline_parallel": 2}, 4, "a pipeline stage of 2 ranks"),
        ({"expert_parallel": 3}, 3, "num_experts=8 is not a multiple of policy.expert_parallel=3"),
        ({"tensor_parallel": 2}, 2, "needs policy.sequence_parallel=true"),
    ],
)
def test_layouts_of_experts_that_do_not_fit(layout: dict, world_size: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_layout(section(**layout), Qwen3MoeConfig(**MODEL, num_experts=8), world_size)


def test_a_dense_model_has_no_experts_to_spread() -> None:
    with pytest.raises(ConfigError, match="expert_parallel=2, but the model has no experts; use 1"):
        check_layout(section(expert_parallel=2), Qwen3Config(**MODEL), 2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("cosine", [0.5, 1, 0.868198, 0.55, 0.231802, 0.1, 0.1]),
    ],
)
def test_learning_rate(schedule: str, expected: list[float]) -> None:
    optimizer = OptimizerSection(lr=1.0, min_lr=0.1, warmup_steps=2, schedule=schedule)
    rates = [learning_rate(optimizer, step, 6) for step in range(1, 8)]
    assert rates == pytest.approx(expected, abs=1e-6)
