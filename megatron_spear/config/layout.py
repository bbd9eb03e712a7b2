"""Which parallel layouts are possible: one line for each rule that is broken."""

from collections.abc import Iterator, Mapping

from megatron_spear.config.schema import PolicySection


def ranks_of_a_replica(policy: PolicySection) -> int:
    """Ranks that train one copy of the model; the world has a multiple."""
    return policy.tensor_parallel * policy.context_parallel * policy.pipeline_parallel


def layout_problems(
    policy: PolicySection,
    world_size: int,
    by_tensor: Mapping[str, int] | None = None,
    by_pipeline: Mapping[str, int] | None = None,
    num_experts: int | None = None,
) -> Iterator[str]:
    """What keeps ``policy``'s layout from ``world_size`` ranks, and from a model of these sizes.

    Args:
        policy: the layout.
        world_size: ranks in all.
        by_tensor: sizes that tensor parallel has to divide, by the name to tell.
        by_pipeline: sizes that pipeline parallel has to divide, by the name to tell.
        num_experts: experts of a layer, 0 for a dense model; None where the model is not known.

    Example: ``policy.tensor_parallel=2`` on 2 ranks with ``by_tensor={"heads": 3}`` gives
    ``heads=3 is not a multiple of policy.tensor_parallel=2; choose a divisor``.
    """
    tensor, pipeline = policy.tensor_parallel, policy.pipeline_parallel
    context, replica = policy.context_parallel, ranks_of_a_replica(policy)
    if world_size % replica:
        yield (
            f"world size {world_size} is not a multiple of policy.tensor_parallel x "
            f"policy.context_parallel x policy.pipeline_parallel = {tensor} x {context} x "
            f"{pipeline}; start {replica} ranks (or a multiple, torchrun --nproc-per-node), or "
            "lower one of the three"
        )
    if policy.sequence_parallel and tensor == 1:
        yield (
            "policy.sequence_parallel needs policy.tensor_parallel > 1; got 1, expected 2 or more "
            "or policy.sequence_parallel=false"
        )
    if policy.overlap_param_gather and not (
        policy.distributed_optimizer and policy.overlap_grad_reduce
    ):
        yield (
            "policy.overlap_param_gather=true gathers what the ranks of a distributed optimizer "
            "have updated, in the buckets of the overlapped reduction; set "
            "policy.distributed_optimizer=true and policy.overlap_grad_reduce=true"
        )
    if policy.optimizer_offload and not policy.distributed_optimizer:
        yield (
            f"policy.optimizer_offload={policy.optimizer_offload:g}: Megatron's optimizer on the "
            "CPU cannot load its state without the distributed one; set "
            "policy.distributed_optimizer=true (with one rank too), or policy.optimizer_offload=0"
        )
    if policy.virtual_pipeline > 1 and pipeline == 1:
        yield (
            f"policy.virtual_pipeline={policy.virtual_pipeline} cuts the pieces of a pipeline, and "
            "policy.pipeline_parallel=1 has none; use 2 or more, or policy.virtual_pipeline=1"
        )
    pieces = f"policy.pipeline_parallel={pipeline}"
    if policy.virtual_pipeline > 1:
        pieces += f" x policy.virtual_pipeline={policy.virtual_pipeline}"
    for sizes, key, parts in (
        (by_tensor or {}, f"policy.tensor_parallel={tensor}", tensor),
        (by_pipeline or {}, pieces, pipeline * policy.virtual_pipeline),
    ):
        for name, size in sizes.items():
            if size % parts:
                yield f"{name}={size} is not a multiple of {key}; choose a divisor"
    yield from _expert_problems(policy, world_size, num_experts)


def _expert_problems(
    policy: PolicySection, world_size: int, num_experts: int | None
) -> Iterator[str]:
    """Experts are whole, and spread over the ranks of a pipeline stage."""
    parts, stage = policy.expert_parallel, world_size // policy.pipeline_parallel
    if num_experts == 0:
        if parts > 1:
            yield f"policy.expert_parallel={parts}, but the model has no experts; use 1"
        return
    if stage % parts:
        yield (
            f"a pipeline stage of {stage} ranks (tensor x context x data parallel) is not a "
            f"multiple of policy.expert_parallel={parts}; choose a divisor"
        )
    if num_experts is None:
        return
    if num_experts % parts:
        yield (
            f"the model's num_experts={num_experts} is not a multiple of "
            f"policy.expert_parallel={parts}; choose a divisor"
        )
    if policy.tensor_parallel > 1 and not policy.sequence_parallel:
        yield (
            f"policy.tensor_parallel={policy.tensor_parallel} of a model with experts needs "
            "policy.sequence_parallel=true: each rank sends its part of the sequence to the experts"
        )
