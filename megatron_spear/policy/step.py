"""One pass of micro-batches through the model by Megatron's own pipeline schedule.

The loss is the plain sum of what the loss function gives for each micro-batch: each token carries
its final weight, so nothing here divides by micro-batches, tokens or ranks, and loss and gradient
do not depend on how the step was packed or laid out. ``model`` is this rank's pieces of the model,
in the order they are run.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed import finalize_model_grads as megatron_finalize
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_spear.algorithms.logprobs import token_logprobs
from megatron_spear.algorithms.policy_loss import TokenLoss
from megatron_spear.data.packing import TrainBatch
from megatron_spear.heartbeats.heart import beat
from megatron_spear.policy.parallel import ParallelContext


def forward_logprobs(
    model: list[DistributedDataParallel],
    batches: Sequence[TrainBatch],
    ctx: ParallelContext,
    vocab_size: int,
    temperature: float,
    with_entropy: bool,
) -> list[tuple[Tensor, Tensor | None]]:
    """Per micro-batch, log-probs and entropy ``[T]`` of this rank's tokens on the last stage; empty
    lists elsewhere."""

    def collect(batch: TrainBatch, logits: Tensor, non_loss_data: bool = True) -> Any:
        return token_logprobs(
            logits,
            batch.labels,
            temperature=temperature,
            vocab_size=vocab_size,
            group=ctx.tensor if ctx.tensor_size > 1 else None,
            with_entropy=with_entropy,
        )

    with torch.no_grad():
        return _run(model, batches, collect, forward_only=True)


def forward_backward(
    model: list[DistributedDataParallel],
    batches: Sequence[TrainBatch],
    ctx: ParallelContext,
    vocab_size: int,
    loss: TokenLoss,
) -> dict[str, float] | None:
    """Leave the summed, fully reduced gradient in the model; the loss's sums on the last stage.

    The result has ``loss/total`` and the loss's own names, for this rank's tokens only.
    """

    def compute(batch: TrainBatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logprobs, entropy = token_logprobs(
            logits,
            batch.labels,
            temperature=loss.temperature,
            vocab_size=vocab_size,
            group=ctx.tensor if ctx.tensor_size > 1 else None,
            with_entropy=loss.needs_entropy,
            entropy_grad=loss.entropy_grad,
        )
        value, sums = loss(logprobs, entropy, batch)
        # three results and calculate_per_token_loss: the schedule leaves the loss as it is
        return value, torch.zeros((), dtype=torch.int), {"loss/total": value.detach(), **sums}

    parts = _run(model, batches, compute, forward_only=False)
    if not ctx.is_last_stage:
        return None
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


def prepare(model: list[DistributedDataParallel]) -> None:
    """Tell Megatron's schedules how gradients are reduced: at the last micro-batch, as sums."""
    pauses = [part.no_sync for part in model]
    for part in model:
        part.module.config.finalize_model_grads_func = finalize_sums
        if part.ddp_config.overlap_grad_reduce:
            part.module.config.no_sync_func = pauses if len(model) > 1 else pauses[0]


def finalize_sums(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by the number of tokens."""
    megatron_finalize(model, None, **kwargs)


def _run(
    model: list[DistributedDataParallel],
    batches: Sequence[TrainBatch],
    on_logits: Callable[..., Any],
    forward_only: bool,
) -> list[Any]:
    def forward_step(data: Iterator[TrainBatch], module: Any) -> tuple[Tensor, Any]:
        batch = next(data)
        beat()
        return module(batch), partial(on_logits, batch)

    split = model[0].module.config.context_parallel_size
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model],
        model=model,
        num_microbatches=len(batches),
        seq_length=max(batch.num_tokens for batch in batches) * split,  # Megatron divides by it
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results
