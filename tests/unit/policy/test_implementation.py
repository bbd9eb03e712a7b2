"""Whose layers are taken, by what is asked for, installed and there."""

import pytest

from megatron_spear.config.schema import PolicySection
from megatron_spear.errors import ConfigError
from megatron_spear.policy import implementation
from megatron_spear.policy.implementation import decide

HOPPER = (9, 0)


def section(asked: str = "auto", recipe: str = "none") -> PolicySection:
    return PolicySection(transformer_impl=asked, precision="bf16", fp8={"recipe": recipe})


@pytest.mark.parametrize(
    ("asked", "installed", "capability", "used", "why"),
    [
        ("auto", True, HOPPER, "transformer_engine", "is installed and a CUDA device is there"),
        ("auto", False, HOPPER, "local", "TransformerEngine is not installed"),
        ("auto", True, None, "local", "there is no CUDA device"),
        ("auto", False, None, "local", "not installed and there is no CUDA device"),
        ("local", True, HOPPER, "local", "as policy.transformer_impl says"),
        ("transformer_engine", True, HOPPER, "transformer_engine", "as policy.transformer_impl"),
    ],
)
def test_choice(
    asked: str, installed: bool, capability: tuple[int, int] | None, used: str, why: str
) -> None:
    chosen, words = decide(section(asked), installed, capability)
    assert chosen.transformer_impl == used
    assert words.startswith(f"{used} layers (") and why in words


@pytest.mark.parametrize(
    ("policy", "installed", "capability", "told"),
    [
        (
            section("transformer_engine"),
            False,
            HOPPER,
            "not installed; install it .pip install",
        ),
        (section("transformer_engine"), True, None, "no CUDA device; start on a machine"),
        (section(recipe="delayed"), False, HOPPER, "delayed needs TransformerEngine on a GPU"),
        (section(recipe="mxfp8"), True, HOPPER, "compute capability 10.0"),
    ],
)
def test_what_is_not_there(
    policy: PolicySection, installed: bool, capability: tuple[int, int] | None, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        decide(policy, installed, capability)


def test_float32_stays_with_local_layers_unless_asked() -> None:
    """TransformerEngine computes packed attention in float32 by its plain kernel only."""
    plain = PolicySection()
    chosen, words = decide(plain, True, HOPPER)
    assert chosen.transformer_impl == "local" and "policy.precision=fp32" in words
    asked = plain.model_copy(update={"transformer_impl": "transformer_engine"})
    assert decide(asked, True, HOPPER)[0].transformer_impl == "transformer_engine"


def test_this_process_takes_local_layers() -> None:
    if implementation.has_transformer_engine() and implementation.cuda_capability():
        pytest.skip("TransformerEngine and a GPU are there")
    assert implementation.choose(section())[0].transformer_impl == "local"
