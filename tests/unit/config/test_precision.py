"""FP8 settings that cannot work are refused with the reason; devices by their capability."""

import re
from typing import Any

import pytest

from megatron_spear.config.check import check_config
from megatron_spear.config.precision import (
    capability_problem,
    fp8_multiple,
    linear_sizes,
    precision_problems,
)
from megatron_spear.config.schema import PolicySection, RunConfig

SIZES = {"hidden": 64, "heads": 4, "groups": 2, "head_dim": 16, "ffn": 96}


def section(
    recipe: str = "tensorwise", *, fp8: dict[str, Any] | None = None, **changes: Any
) -> Any:
    values = {"precision": "bf16", "fp8": {"recipe": recipe} | (fp8 or {})} | changes
    return PolicySection(**values)


def problems(policy: PolicySection, num_layers: int = 8) -> list[str]:
    sizes = linear_sizes(**SIZES, experts=False, tensor_parallel=policy.tensor_parallel)
    return list(precision_problems(policy, num_layers, sizes))


@pytest.mark.parametrize("recipe", ["none", "tensorwise", "blockwise"])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_what_fits(recipe: str, tensor_parallel: int) -> None:
    assert problems(section(recipe, tensor_parallel=tensor_parallel)) == []


def test_without_fp8_nothing_is_asked() -> None:
    assert problems(PolicySection(), num_layers=1) == []


NO_ENDS = {"bf16_layers_at_start": 0, "bf16_layers_at_end": 0}


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (section(precision="fp32"), "policy.precision=fp32; set policy.precision=bf16"),
        (section(transformer_impl="local"), "policy.transformer_impl=local has none"),
        (section("none", fp8={"parameters": True}), "policy.fp8.recipe=none has none"),
        (section(fp8={"parameters": True}), "needs policy.distributed_optimizer=true"),
        (
            section("mxfp8", fp8={"parameters": True}, distributed_optimizer=True),
            "takes that of the gradients",
        ),
        (
            section(fp8={"parameters": True}, distributed_optimizer=True, optimizer_offload=0.5),
            "policy.optimizer_offload=0.5 they are on the CPU",
        ),
        (section("delayed"), "set policy.fp8.bf16_layers_at_start and .*_at_end to 0"),
        (section(fp8={"bf16_layers_at_start": 7}), "leave none of the model's 8 layers in FP8"),
        (
            section(fp8={"bf16_layers_at_start": 3}, pipeline_parallel=4),
            "bf16_layers_at_start=3 is above the 2 layers of a pipeline stage",
        ),
        (
            section("mxfp8", tensor_parallel=2),
            "multiplies 32 values at a time, and linear_fc2's input is 48 on a rank",
        ),
        (section(tensor_parallel=4), "linear_fc2's input is 24 on a rank .*tensor_parallel=4"),
    ],
)
def test_what_does_not(policy: PolicySection, told: str) -> None:
    (line,) = problems(policy)
    assert re.search(told, line), line


def test_delayed_scaling_without_bf16_layers() -> None:
    assert problems(section("delayed", fp8=NO_ENDS)) == []


def test_an_expert_is_not_split() -> None:
    sizes = {e: linear_sizes(**SIZES, experts=e, tensor_parallel=2) for e in (False, True)}
    assert sizes[False]["linear_fc2's input"] == 48 and sizes[True]["linear_fc2's input"] == 96
    assert sizes[True]["linear_qkv's output"] == 64 and sizes[True]["linear_proj's input"] == 32


def test_tokens() -> None:
    assert [fp8_multiple(section(r)) for r in ("none", "tensorwise", "mxfp8")] == [1, 16, 32]


def test_in_a_run_configuration() -> None:
    """The made model's sizes, and the reference policy, whose weights are exchanged."""
    policy = section(fp8={"parameters": True}, distributed_optimizer=True).model_dump()
    assert check_config(RunConfig(policy=policy), 1) == []
    told = check_config(RunConfig(policy=policy, algorithm={"kl": {"coef": 0.1}}), 1)
    assert len(told) == 1 and "reference policy" in told[0]
    told = check_config(RunConfig(policy=policy, model={"tiny": {"ffn_size": 200}}), 1)
    assert len(told) == 1 and "linear_fc2's input is 200" in told[0]


@pytest.mark.parametrize(
    ("recipe", "capability", "told"),
    [
        ("delayed", (8, 9), None),
        ("tensorwise", (9, 0), None),
        ("blockwise", (9, 0), None),
        ("mxfp8", (10, 0), None),
        ("none", None, None),
        ("delayed", (8, 0), "needs CUDA compute capability 8.9, Ada or newer; the GPU has 8.0"),
        ("blockwise", (8, 9), "use delayed or tensorwise"),
        ("mxfp8", (9, 0), "Blackwell .*use delayed or tensorwise or blockwise"),
        ("mxfp8", (12, 0), "not there for compute capability 12.0"),
        ("tensorwise", None, "there is no GPU; set policy.fp8.recipe=none"),
    ],
)
def test_devices(recipe: str, capability: tuple[int, int] | None, told: str | None) -> None:
    import re

    problem = capability_problem(recipe, capability)
    assert (problem is None) == (told is None)
    assert told is None or re.search(told, problem or ""), problem
