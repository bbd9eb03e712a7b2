"""A stand-in for TransformerEngine (TE), for tests on machines that cannot have it.

It is **not** TransformerEngine: a small package in plain torch, on the CPU, with the names,
arguments and behaviours of TE 2 that megatron-core 0.16.1 and 0.19.2 use for the layers of this
project, so that everything around TE can be tested: layer specs, weights in and out, checkpoints,
which layer enters FP8, the start-up audit. ``install`` lets a process import it as
``transformer_engine``, which has to happen before megatron is imported: ``run_ranks(...,
fake_te=True)`` does so.

What it has: Linear, LayerNormLinear and GroupedLinear with tensor and sequence parallelism,
RMSNorm, causal attention of packed sequences ("thd"), FP8 contexts and state, recomputation,
weights held in FP8 with a copy for the backward pass, and the sizes that TE refuses. In FP8 a
linear rounds input, weight and the output's gradient to float8 with a scale per tensor or block,
and multiplies the rounded values in float32.

What it has not: TE's kernels, their speed, their order of summation, user buffers, context parallel
attention. Delayed scaling keeps one amax a tensor and does not
reduce it over ranks; weights held in FP8 are scaled by their present amax with every recipe.
That the real TE works on a GPU is not shown by any test with it.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any


def install() -> None:
    """Let this process import the stand-in as ``transformer_engine``, and the policy take it for a
    GPU's; for processes that have not imported megatron yet."""
    assert "megatron.core" not in sys.modules, "megatron has looked for TransformerEngine already"
    sys.path.insert(0, str(Path(__file__).parent))
    from megatron_spear.policy import implementation

    implementation.cuda_capability = lambda: (10, 0)
    _gather_each_dtype_alone()


def _gather_each_dtype_alone() -> None:
    """Weights in FP8 and in bf16 are gathered by one call, which gloo carries out in one dtype.

    Here by one after the other, which are done when a call that overlaps them returns.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    groups = buffers._ParamAndGradBucketGroup
    together, manager = groups.start_param_sync, buffers._coalescing_manager
    gather = buffers.dist_all_gather_func

    def start_param_sync(self: Any, *args: Any, **kwargs: Any) -> None:
        if len({bucket.param_data.dtype for bucket in self.buckets}) > 1:
            buffers._coalescing_manager = _apart
            buffers.dist_all_gather_func = partial(_at_once, gather)
        try:
            together(self, *args, **kwargs)
        finally:
            buffers._coalescing_manager = manager
            buffers.dist_all_gather_func = gather

    groups.start_param_sync = start_param_sync


class _Done:
    def wait(self) -> None: ...


def _apart(*args: Any, **kwargs: Any) -> AbstractContextManager[_Done]:
    return nullcontext(_Done())


def _at_once(gather: Any, *args: Any, async_op: bool, **kwargs: Any) -> None:
    gather(*args, **kwargs)
