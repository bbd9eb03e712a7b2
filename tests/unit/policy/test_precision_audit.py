"""The audit's table and complaints, on made observations."""

from collections.abc import Iterator

import pytest

from megatron_spear.config.schema import Fp8Section
from megatron_spear.policy.precision_audit import NOT_RUN, Seen, complaints, ranges, table

FP8 = "fp8 (tensorwise, hybrid)"
NAMES = ("linear_qkv", "linear_proj")


def observed(num_layers: int = 6, **changes: str) -> Iterator[Seen]:
    """A model as it should be, one bf16 layer at each end; ``changes`` are by ``name_layer``."""
    for layer in range(num_layers):
        inner = 0 < layer < num_layers - 1
        for name in NAMES:
            precision = changes.get(f"{name}_{layer}", FP8 if inner else "bf16")
            yield Seen(layer=layer, name=name, precision=precision, held=inner)
        yield Seen(layer=layer, name="router", precision="fp32")
    yield Seen(layer=-1, name="output_layer", precision="bf16")


def test_table() -> None:
    assert table(observed()) == [
        "  output_layer: bf16",
        "  layers 0-5: router: fp32",
        "  layers 0, 5: linear_proj, linear_qkv: bf16",
        f"  layers 1-4: linear_proj, linear_qkv: {FP8}, weights in fp8",
    ]


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 8, 5]) == "0-2, 5, 7-8"


@pytest.mark.parametrize(
    ("settings", "changes", "told"),
    [
        ({}, {}, []),
        ({"parameters": True}, {}, []),
        ({}, {"linear_qkv_2": "bf16"}, ["layer 2 linear_qkv: bf16", "expected fp8 (tensorwise)"]),
        ({}, {"linear_proj_1": NOT_RUN}, ["layer 1 linear_proj: not run"]),
        ({}, {"linear_proj_0": FP8}, [f"layer 0 linear_proj: {FP8}", "expected bf16"]),
        ({}, {"linear_proj_3": "fp8 (delayed, hybrid)"}, ["expected fp8 (tensorwise)"]),
    ],
)
def test_complaints(settings: dict, changes: dict, told: list[str]) -> None:
    fp8 = Fp8Section(recipe="tensorwise", **settings)
    found = list(complaints(observed(**changes), fp8, 6))
    assert len(found) == bool(told)
    assert all(part in found[0] for part in told)


def test_weights_that_should_be_held_in_fp8() -> None:
    fp8 = Fp8Section(recipe="tensorwise", parameters=True)
    plain = Seen(layer=2, name="linear_qkv", precision=FP8)
    (line,) = complaints([plain], fp8, 6)
    assert "expected weights in fp8" in line
