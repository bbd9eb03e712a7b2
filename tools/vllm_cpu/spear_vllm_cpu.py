"""What vLLM's workers need on a CPU to take new weights; given by `--worker-extension-cls`.

vLLM imports this module in each worker before the model is made, which is all it takes:

1. Linear layers keep no packed copy of the weight. An update does not reach such a copy: vLLM would
   report success, even new checksums, and go on with the old weights.
2. Experts' weights are packed again after an update. vLLM packs them at the start only, so that the
   kernel would read plain weights as packed ones.
3. The weight-transfer backend `megatron_spear` is known, as on a GPU.
"""

from typing import Any

from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from megatron_spear.weight_sync.receivers.vllm import WorkerExtension

_custom_ops._supports_onednn = False
_set_up_experts = UnquantizedFusedMoEMethod._setup_kernel


def _set_up_and_pack_experts(self: Any, layer: Any, w13: Any, w2: Any) -> None:
    is_update = self.moe_kernel is not None
    _set_up_experts(self, layer, w13, w2)
    if is_update:
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)


UnquantizedFusedMoEMethod._setup_kernel = _set_up_and_pack_experts


class CpuWorkerExtension(WorkerExtension):
    """Adds nothing to a worker: vLLM imports the module for it."""
