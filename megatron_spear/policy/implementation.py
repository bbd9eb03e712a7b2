"""Whose layers the model is made of: the one place where it is chosen, and why."""

import importlib.util

from megatron_spear.config.precision import capability_problem
from megatron_spear.config.schema import PolicySection
from megatron_spear.errors import ConfigError

INSTALL = 'pip install --no-build-isolation "transformer-engine[pytorch]", see docs/precision.md'


def cuda_capability() -> tuple[int, int] | None:
    """The CUDA device's compute capability; None without one."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def has_transformer_engine() -> bool:
    """Whether TransformerEngine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def choose(policy: PolicySection) -> tuple[PolicySection, str]:
    """``policy`` with ``transformer_impl`` decided, and the decision with its reason in words.

    Raises ConfigError where what is asked for is not there, or the device lacks the FP8 recipe.
    """
    return decide(policy, has_transformer_engine(), cuda_capability())


def decide(
    policy: PolicySection, installed: bool, capability: tuple[int, int] | None
) -> tuple[PolicySection, str]:
    """``choose`` as a pure function of whether TransformerEngine is installed and of the device."""
    asked = policy.transformer_impl
    missing = []
    if not installed:
        missing.append("TransformerEngine is not installed")
    if capability is None:
        missing.append("there is no CUDA device")
    if missing and asked == "transformer_engine":
        raise ConfigError(
            f"policy.transformer_impl=transformer_engine: {' and '.join(missing)}; "
            f"{_remedy(missing)}"
        )
    slow = asked == "auto" and policy.precision == "fp32"
    used = "local" if missing or slow or asked == "local" else "transformer_engine"
    recipe = policy.fp8.recipe
    if recipe != "none":
        if missing:
            raise ConfigError(
                f"policy.fp8.recipe={recipe} needs TransformerEngine on a GPU: "
                f"{' and '.join(missing)}; {_remedy(missing)}"
            )
        if problem := capability_problem(recipe, capability):
            raise ConfigError(problem)
    if missing:
        reason = " and ".join(missing)
    elif slow:
        reason = "TransformerEngine's fast attention is for bf16, and policy.precision=fp32"
    else:
        reason = "TransformerEngine is installed and a CUDA device is there"
    why = f"auto: {reason}" if asked == "auto" else "as policy.transformer_impl says"
    return policy.model_copy(update={"transformer_impl": used}), f"{used} layers ({why})"


def _remedy(missing: list[str]) -> str:
    steps = [f"install it ({INSTALL})"] if "TransformerEngine is not installed" in missing else []
    if "there is no CUDA device" in missing:
        steps.append("start on a machine with a GPU")
    return f"{' and '.join(steps)}, or set policy.transformer_impl=auto and policy.fp8.recipe=none"
