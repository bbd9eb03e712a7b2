"""Whether a model of some shape can be cut as a layout says; pure, without torch."""

from collections.abc import Iterator

from megatron_spear.config.layout import layout_problems
from megatron_spear.config.precision import linear_sizes, precision_problems
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape, split_sizes


def model_problems(policy: PolicySection, shape: ModelShape, world_size: int) -> Iterator[str]:
    """One line for each rule that keeps the model from the layout or its precision."""
    by_tensor = {f"the model's {name}": size for name, size in split_sizes(shape).items()}
    by_pipeline = {"the model's num_hidden_layers": shape.num_layers}
    linears = linear_sizes(
        hidden=shape.hidden_size,
        heads=shape.num_heads,
        groups=shape.num_groups,
        head_dim=shape.head_dim,
        ffn=shape.ffn_size,
        experts=shape.num_experts > 0,
        tensor_parallel=policy.tensor_parallel,
    )
    yield from layout_problems(policy, world_size, by_tensor, by_pipeline, shape.num_experts)
    yield from precision_problems(policy, shape.num_layers, linears)
