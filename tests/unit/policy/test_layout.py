"""Layouts that do not fit are refused with all reasons; learning-rate schedules by hand."""

import pytest
from transformers import LlamaConfig, Qwen3Config

from megatron_spear.config.schema import OptimizerSection, PolicySection
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
        section(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
        Qwen3Config(**MODEL),
        8,
    )


def test_world_size() -> None:
    with pytest.raises(
        ConfigError, match=r"world size 8 is not a multiple of .* = 3 x 2; start 6 ranks"
    ):
        check_layout(section(tensor_parallel=3, pipeline_parallel=2), Qwen3Config(**MODEL), 8)
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
