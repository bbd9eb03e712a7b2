"""What vLLM's workers need on a CPU to take new weights; given by `--worker-extension-cls`.

vLLM imports this module in each worker before the model is made, which is all it takes:

1. Linear layers keep no packed copy of the weight. An update does not reach such a copy: vLLM would
   report success, even new checksums, and go on with the old weights.
2. Experts' weights are packed again after an update. vLLM packs them at the start only, so that the
   kernel would read plain weights as packed ones.
3. Weight transfer has a backend `gloo`. It takes the requests of vLLM's own `nccl` backend with
   packed=false and receives by gloo: a broadcast from rank 0 for each tensor, in the names' order.
"""

from typing import Any

import torch
import torch.distributed as dist
from vllm import _custom_ops
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

import megatron_spear.weight_sync.receivers.vllm  # noqa: F401  (makes its backend known)
from megatron_spear import peer_groups

GROUP_NAME = "weight_update_group"
"""The name under which trainer and workers meet; the requests have no field for it."""

TIMEOUT_S = 120.0
"""Longest wait for the trainer, when the group is made and in each broadcast."""

_custom_ops._supports_onednn = False
_set_up_experts = UnquantizedFusedMoEMethod._setup_kernel


def _set_up_and_pack_experts(self: Any, layer: Any, w13: Any, w2: Any) -> None:
    is_update = self.moe_kernel is not None
    _set_up_experts(self, layer, w13, w2)
    if is_update:
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)


UnquantizedFusedMoEMethod._setup_kernel = _set_up_and_pack_experts


class CpuWorkerExtension:
    """Adds nothing to a worker: vLLM imports the module for it."""


class GlooWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]
    """The `nccl` backend's requests and layer-wise reload, with gloo's broadcasts."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the trainer's group; a worker's rank is its own plus ``rank_offset``."""
        if init_info.packed:
            raise ValueError("the gloo backend got packed=true, and takes packed=false only")
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.shutdown()
        self.model_update_group = peer_groups.join(
            backend="gloo",
            host=init_info.master_address,
            port=init_info.master_port,
            rank=init_info.rank_offset + worker,
            world_size=init_info.world_size,
            name=GROUP_NAME,
            timeout_s=TIMEOUT_S,
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does, without its wait for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive and load tensor by tensor."""
        rows = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in rows:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(tensor, src=0, group=self.model_update_group)
            self.model.load_weights([(name, tensor)])

    def shutdown(self) -> None:
        """Leave the group, if there is one."""
        if self.model_update_group is not None:
            peer_groups.leave(self.model_update_group)
            self.model_update_group = None


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
