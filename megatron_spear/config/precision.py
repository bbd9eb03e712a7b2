"""What FP8 needs of settings, model and device: one line for each rule that is broken.

Sizes are those of TransformerEngine's matrix products: 16 values at a time, 32 for mxfp8 (whose
blocks are that long). Its blockwise products pad their blocks of 128 themselves and need 16 too.
"""

from collections.abc import Iterator, Mapping

from megatron_spear.config.schema import PolicySection

CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""The lowest compute capability with the recipe's matrix products: Ada, Hopper, Blackwell."""

CHIPS = {(8, 9): "Ada or newer", (9, 0): "Hopper or newer", (10, 0): "Blackwell (sm100)"}

REFERENCE_PROBLEM = (
    "policy.fp8.parameters=true holds weights in FP8, which cannot be exchanged with those of a "
    "reference policy (algorithm.kl.coef > 0 asks for one); set policy.fp8.parameters=false"
)


def fp8_multiple(policy: PolicySection) -> int:
    """What sizes have to be multiples of; 1 without FP8."""
    recipe = policy.fp8.recipe
    return 1 if recipe == "none" else 32 if recipe == "mxfp8" else 16


def precision_problems(
    policy: PolicySection,
    num_layers: int | None = None,
    linears: Mapping[str, int] | None = None,
) -> Iterator[str]:
    """What keeps ``policy`` from its precision, and from a model of these sizes.

    Args:
        policy: layout and precision.
        num_layers: decoder layers; None where the model is not known.
        linears: by the name to tell, inner sizes of the layers' linears on one rank.

    Example: ``policy.fp8.recipe=tensorwise`` with ``linears={"hidden size": 100}`` gives one line
    that says that 100 is no multiple of 16.
    """
    fp8 = policy.fp8
    if fp8.recipe == "none":
        if fp8.parameters:
            yield (
                "policy.fp8.parameters=true holds weights in FP8, and policy.fp8.recipe=none has "
                "none; choose a recipe, or set it to false"
            )
        return
    named = f"policy.fp8.recipe={fp8.recipe}"
    if policy.precision != "bf16":
        yield (
            f"{named} keeps in bf16 what is not in FP8, and policy.precision={policy.precision}; "
            "set policy.precision=bf16"
        )
    if policy.transformer_impl == "local":
        yield (
            f"{named} runs in TransformerEngine's layers, and policy.transformer_impl=local has "
            "none; set it to transformer_engine or auto"
        )
    yield from _parameter_problems(policy)
    yield from _bf16_layer_problems(policy, num_layers)
    multiple = fp8_multiple(policy)
    for name, size in (linears or {}).items():
        if size % multiple:
            yield (
                f"{named} multiplies {multiple} values at a time, and {name} is {size} on a rank "
                f"(policy.tensor_parallel={policy.tensor_parallel}), which is no multiple; choose "
                "another layout, or policy.fp8.recipe=none"
            )


def _parameter_problems(policy: PolicySection) -> Iterator[str]:
    if not policy.fp8.parameters:
        return
    if not policy.distributed_optimizer:
        yield (
            "policy.fp8.parameters=true needs policy.distributed_optimizer=true: only it rounds "
            "float32 weights to FP8 ones after a step"
        )
    if policy.optimizer_offload:
        yield (
            "policy.fp8.parameters=true rounds float32 weights on the GPU, and with "
            f"policy.optimizer_offload={policy.optimizer_offload:g} they are on the CPU; set one "
            "of them off"
        )
    if policy.fp8.recipe == "mxfp8":
        yield (
            "policy.fp8.parameters=true with policy.fp8.recipe=mxfp8: such weights cannot lie in "
            "Megatron's buffer for weights, and its way round takes that of the gradients, which "
            "is in use here; set policy.fp8.parameters=false or another recipe"
        )


def _bf16_layer_problems(policy: PolicySection, num_layers: int | None) -> Iterator[str]:
    fp8 = policy.fp8
    ends = {
        "policy.fp8.bf16_layers_at_start": fp8.bf16_layers_at_start,
        "policy.fp8.bf16_layers_at_end": fp8.bf16_layers_at_end,
    }
    if fp8.recipe == "delayed" and any(ends.values()):
        yield (
            "policy.fp8.recipe=delayed runs all layers in one FP8 context, at whose end scales are "
            f"reduced, so Megatron has no bf16 layers with it; set {' and '.join(ends)} to 0, or "
            "take another recipe"
        )
        return
    if num_layers is None:
        return
    if sum(ends.values()) >= num_layers:
        settings = " and ".join(f"{name}={count}" for name, count in ends.items())
        yield f"{settings} leave none of the model's {num_layers} layers in FP8; lower them"
        return
    stage = num_layers // policy.pipeline_parallel
    for name, count in ends.items():
        if count > stage:
            yield (
                f"{name}={count} is above the {stage} layers of a pipeline stage "
                f"(policy.pipeline_parallel={policy.pipeline_parallel}), Megatron's limit; lower "
                "one of the two"
            )


def linear_sizes(
    *,
    hidden: int,
    heads: int,
    groups: int,
    head_dim: int,
    ffn: int,
    experts: bool,
    tensor_parallel: int,
) -> dict[str, int]:
    """What goes into and comes out of each linear of a layer on one rank, by the name to tell.

    An expert is never split. Example: hidden 64, 4 heads of 16 in 2 groups, ffn 96, tensor parallel
    2: 64 goes in, 64 comes out of linear_qkv, 32 goes into linear_proj, 96 come out of linear_fc1,
    48 go into linear_fc2.
    """
    inner = ffn if experts else ffn // tensor_parallel
    return {
        "the hidden size (into linear_qkv and linear_fc1)": hidden,
        "linear_qkv's output": (heads + 2 * groups) * head_dim // tensor_parallel,
        "linear_proj's input": heads * head_dim // tensor_parallel,
        "linear_fc1's output": 2 * inner,
        "linear_fc2's input": inner,
    }


def capability_problem(recipe: str, capability: tuple[int, int] | None) -> str | None:
    """Why a device of this CUDA compute capability does not run the recipe; None if it does.

    Example: mxfp8 on a Hopper GPU, (9, 0), needs 10.0.
    """
    if recipe == "none":
        return None
    needed = CAPABILITY[recipe]
    if capability is not None and capability >= needed:
        if recipe != "mxfp8" or capability < (12, 0):
            return None
        return (
            f"policy.fp8.recipe=mxfp8 is not there for compute capability {_dotted(capability)} "
            "(12.0 and above); use tensorwise"
        )
    lower = [name for name, least in CAPABILITY.items() if capability and capability >= least]
    instead = f"use {' or '.join(lower)}" if lower else "set policy.fp8.recipe=none"
    found = f"the GPU has {_dotted(capability)}" if capability else "there is no GPU"
    return (
        f"policy.fp8.recipe={recipe} needs CUDA compute capability {_dotted(needed)}, "
        f"{CHIPS[needed]}; {found}; {instead}"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
