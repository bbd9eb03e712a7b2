"""The policy: log-probs, one optimizer step, weights out, state in and out.

Every method marked collective has to be called by all ranks in the same order. The controller
(rank 0) passes the data; the other ranks pass None.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_spear.algorithms.policy_loss import TokenLoss
from megatron_spear.config.precision import REFERENCE_PROBLEM, fp8_multiple
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.conversion.shape import ModelShape, load_config, model_shape
from megatron_spear.conversion.slices import TensorSlice
from megatron_spear.data.packing import PackedStep
from megatron_spear.data.zigzag import joined
from megatron_spear.errors import ConfigError
from megatron_spear.policy import (
    checkpoint,
    cpu,
    exchange,
    implementation,
    offload,
    precision_audit,
    step,
    weights,
)
from megatron_spear.policy.model import PackedModel
from megatron_spear.policy.optimizer import build_optimizer, learning_rate
from megatron_spear.policy.parallel import ParallelContext, check_layout

logger = logging.getLogger(__name__)


class MegatronPolicy:
    """This rank's pieces of a Megatron-Core model with their optimizer; see ``from_hf``."""

    def __init__(
        self,
        shape: ModelShape,
        policy: PolicySection,
        optimizer: OptimizerSection,
        total_steps: int,
        ctx: ParallelContext,
    ) -> None:
        policy, layers = implementation.choose(policy)
        if ctx.is_controller:
            logger.info("%s", layers)
        self.shape, self.ctx = shape, ctx
        self._section, self._total_steps = optimizer, total_steps
        self.num_steps = self.num_updates = 0
        with cpu.cuda_means_cpu():
            self._chunks = [
                PackedModel(shape, policy, ctx, number).to(ctx.device)
                for number in range(policy.virtual_pipeline)
            ]
            self._model = [_distributed(chunk, policy) for chunk in self._chunks]
        step.prepare(self._model)
        self._policy = policy
        self._optimizer: Any = None
        self._reference: list[Tensor] = []

    @classmethod
    def from_hf(
        cls,
        path: Path,
        policy: PolicySection,
        optimizer: OptimizerSection,
        total_steps: int,
        ctx: ParallelContext,
    ) -> "MegatronPolicy":
        """The model of a Hugging Face folder, ready to train; collective.

        ``total_steps`` is the number of optimizer steps the learning-rate schedule spans. Raises
        ConfigError if the layout does not fit the model, CheckpointError if the folder is broken.
        """
        config = load_config(Path(path))
        check_layout(policy, config, ctx.world_size)
        made = cls(model_shape(config), policy, optimizer, total_steps, ctx)
        weights.load_hf(made._chunks, Path(path), made.shape, ctx)
        made.reset_optimizer(optimizer, total_steps)
        if policy.fp8.recipe != "none":
            precision_audit.audit(made, policy.fp8)
        return made

    def reset_optimizer(self, optimizer: OptimizerSection, total_steps: int) -> None:
        """Start over with a new optimizer and schedule on the present weights."""
        self._section, self._total_steps = optimizer, total_steps
        self.num_steps = self.num_updates = 0
        self._optimizer = build_optimizer(self._model, optimizer, self._policy)

    def keep_reference(self) -> None:
        """Keep the present weights, on the CPU, as the reference policy of ``logprobs``.

        ConfigError if weights are held in FP8."""
        if self._policy.fp8.parameters:
            raise ConfigError(REFERENCE_PROBLEM)
        self._gather_weights()
        self._reference = [p.detach().to("cpu", copy=True) for p in self._parameters()]

    @property
    def pad_multiple(self) -> int:
        """What ``pack`` has to pad micro-batches to."""
        split = self.ctx.tensor_size if self._policy.sequence_parallel else 1
        return fp8_multiple(self._policy) * split * self.ctx.context_size

    @property
    def sequence_multiple(self) -> int:
        """What ``pack`` has to pad sequences to: context parallelism's chunks (``data.zigzag``)."""
        return 2 * self.ctx.context_size if self.ctx.context_size > 1 else 1

    @property
    def mix_lengths(self) -> bool:
        """Whether ``pack`` may mix lengths: attention on packed tokens pays nothing for it."""
        return bool(self._chunks[0].packed_attention)

    @property
    def microbatch_multiple(self) -> int:
        """What the number of micro-batches that ``pack`` makes has to be a multiple of."""
        return self.ctx.pipeline_size if self._policy.virtual_pipeline > 1 else 1

    def logprobs(
        self,
        packed: PackedStep | None,
        temperature: float,
        with_entropy: bool = False,
        *,
        reference: bool = False,
    ) -> Any:
        """Log-probs of the present weights, one float32 ``[L]`` a sample; None off the controller.

        Entry t speaks of token t, entry 0 is 0. With ``with_entropy`` a pair (log-probs, entropies)
        of such lists; the entropy at t is that of the distribution token t was drawn from.
        ``reference`` asks for those of the weights at ``keep_reference``. Collective.
        """
        batches, (temperature, with_entropy, reference) = exchange.scatter(
            packed, (temperature, with_entropy, reference), self.ctx
        )
        with self._weights_of_reference() if reference else nullcontext():
            results = step.forward_logprobs(
                self._model, batches, self.ctx, self.shape.vocab_size, temperature, with_entropy
            )
        flat = [tuple(x.cpu() for x in result if x is not None) for result in results]
        gathered = exchange.gather(flat, self.ctx)
        if gathered is None:
            return None
        assert packed is not None
        lists: list[list[np.ndarray]] = [
            packed.unpack(_joined(gathered, packed, i)) for i in range(2 if with_entropy else 1)
        ]
        return (lists[0], lists[1]) if with_entropy else lists[0]

    def train_step(
        self,
        packed: PackedStep | None,
        loss: TokenLoss | None,
        apart: PackedStep | None = None,
        *,
        scheduled: bool = True,
    ) -> dict[str, float]:
        """One optimizer step on the plain sum of ``loss`` over all tokens; collective.

        Gives, on every rank: ``grad_norm`` (before clipping), ``lr``, ``skipped`` (1 if the
        gradient was not finite and the weights were left alone), ``loss/total`` and the sums the
        loss reports, over all tokens. ``apart`` is a second part of the same step: the
        gradients are added, and ``grad_norm_first`` and ``grad_norm_second`` tell their norms. The
        learning-rate schedule stands still for a step that is not ``scheduled``.
        """
        batches, (loss, scheduled, more) = exchange.scatter(
            packed, (loss, scheduled, apart is not None), self.ctx
        )
        assert loss is not None
        sums = self.compute_gradient(batches, loss)
        norms: dict[str, float] = {}
        totals = exchange.all_sum(sums, self.ctx)
        if more:
            batches, _ = exchange.scatter(apart, None, self.ctx)
            sums, norms = self._add_gradient(batches, loss)
            others = exchange.all_sum(sums, self.ctx)
            totals = {name: value + others[name] for name, value in totals.items()}
        self.num_steps += scheduled
        self.num_updates += 1
        rate = learning_rate(self._section, max(self.num_steps, 1), self._total_steps)
        return {"lr": rate, **self._update(rate), **norms, **totals}

    def compute_gradient(self, batches: Any, loss: TokenLoss) -> dict[str, float] | None:
        """Forward and backward of this rank's micro-batches; the reduced gradient stays."""
        for model in self._model:
            model.zero_grad_buffer()
        self._optimizer.zero_grad()
        return step.forward_backward(self._model, batches, self.ctx, self.shape.vocab_size, loss)

    def _add_gradient(
        self, batches: Any, loss: TokenLoss
    ) -> tuple[dict[str, float] | None, dict[str, float]]:
        """Add the gradient of ``batches`` to the one in the model: (its sums, both norms)."""
        buffers = [b for m in self._model for b in (*m.buffers, *m.expert_parallel_buffers)]
        first = self._gradient_norm()
        kept = [buffer.grad_data.clone() for buffer in buffers]
        sums = self.compute_gradient(batches, loss)
        norms = {"grad_norm_first": first, "grad_norm_second": self._gradient_norm()}
        for buffer, gradient in zip(buffers, kept, strict=True):
            buffer.grad_data += gradient
        return sums, norms

    def _gather_weights(self) -> None:
        """Make all weights present that the next forward pass would have gathered; collective."""
        if self._policy.overlap_param_gather:
            for model in self._model:
                for buckets in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
                    # As that pass would: until Megatron 0.18 ``start_param_sync(force_sync=True)``
                    # leaves FP8 weights' copies for the backward pass as they were, for good.
                    buckets.finish_param_sync(skip_next_bucket_dispatch=True)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for chunk in self._chunks for parameter in chunk.parameters()]

    def _gradient_norm(self) -> float:
        with cpu.cuda_means_cpu():
            self._optimizer.prepare_grads()
            return float(self._optimizer.get_grad_norm())

    @contextmanager
    def _weights_of_reference(self) -> Iterator[None]:
        """The reference policy's weights in the model, for a pass without gradients."""
        if not self._reference:
            raise ConfigError(
                "log-probs of the reference policy were asked for, but none was kept; call "
                "keep_reference while the model has its weights (algorithm.kl.coef > 0 does)"
            )
        parameters = self._parameters()
        present = [parameter.data for parameter in parameters]
        try:
            for parameter, value in zip(parameters, self._reference, strict=True):
                parameter.data = value.to(parameter.device)
            yield
        finally:
            for parameter, data in zip(parameters, present, strict=True):
                parameter.data = data

    def _update(self, rate: float) -> dict[str, float]:
        """Clip and step; a gradient that is not finite is reported and skipped on all ranks."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with cpu.cuda_means_cpu():
            norm = self._gradient_norm()
            worst = torch.tensor([norm if math.isfinite(norm) else math.inf])
            if self.ctx.world_size > 1:
                dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.ctx.control)
            if not math.isfinite(worst.item()):
                logger.warning(
                    "optimizer step %d skipped: the gradient norm is %s", self.num_updates, norm
                )
                return {"grad_norm": math.nan, "skipped": 1.0}
            if self._section.clip_grad > 0:
                params = [p for group in self._optimizer.param_groups for p in group["params"]]
                decoupled = offload.decouples_gradients(self._optimizer.config)
                clip_grad_by_total_norm_fp32(params, self._section.clip_grad, norm, decoupled)
            self._optimizer.step_with_ready_grads()
        return {"grad_norm": norm, "skipped": 0.0}

    def export_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Whole tensors by Hugging Face name, on rank 0; (name, None) elsewhere. Collective.

        See ``weights.export_hf``: iterate to the end, copy what is kept.
        """
        self._gather_weights()
        return weights.export_hf(self._chunks, self.shape, self.ctx)

    def local_slices(self) -> tuple[TensorSlice, ...]:
        """What this rank holds of each Hugging Face tensor, as views; see ``conversion.slices``.

        Collective, since weights are gathered that the next forward pass would gather.
        """
        self._gather_weights()
        return weights.local_slices(self._chunks, self.shape, self.ctx)

    def save(self, folder: Path) -> None:
        """Model, optimizer and step into ``folder``, loadable at another layout; collective."""
        self._gather_weights()
        checkpoint.save(Path(folder), self._chunks, self._optimizer, self._counts(), self.ctx)

    def begin_save(self, folder: Path) -> checkpoint.PendingSave:
        """``save`` of the present state, written beside what is done next; ``finish`` it.
        Collective."""
        self._gather_weights()
        return checkpoint.begin_save(
            Path(folder), self._chunks, self._optimizer, self._counts(), self.ctx
        )

    def load(self, folder: Path) -> None:
        """What ``save`` wrote; CheckpointError if it is missing, broken or of another model.
        Collective."""
        counts = checkpoint.load(Path(folder), self._chunks, self._optimizer, self.ctx)
        self.num_steps, self.num_updates = counts.steps, counts.updates

    def _counts(self) -> checkpoint.Counts:
        return checkpoint.Counts(steps=self.num_steps, updates=self.num_updates)


def _joined(gathered: list[list[Any]], packed: PackedStep, number: int) -> list[list[Tensor]]:
    """``gathered[d][c][m][number]``, of data-parallel rank d's m-th micro-batch the tokens of
    context-parallel rank c, put together: ``[d][m]`` for all tokens."""
    return [
        [
            joined([part[m][number] for part in parts], batch.cu_seqlens)
            for m, batch in enumerate(batches)
        ]
        for parts, batches in zip(gathered, packed.micro_batches, strict=True)
    ]


def _distributed(chunk: PackedModel, policy: PolicySection) -> DistributedDataParallel:
    """Megatron's data-parallel wrapper, which adds gradients up in float32."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=policy.distributed_optimizer,
        overlap_grad_reduce=policy.overlap_grad_reduce,
        overlap_param_gather=policy.overlap_param_gather,
        fp8_param_gather=policy.fp8.parameters,
    )
    return DistributedDataParallel(config=chunk.config, ddp_config=settings, module=chunk)
