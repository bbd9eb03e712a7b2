"""What vLLM's workers need on a CPU to take new weights: given by `--worker-extension-cls`.

vLLM imports this module in each worker before the model is made, so importing it is enough:

1. Linear layers keep no packed copy of the weight. An update does not reach such a copy: vLLM would
   report success, even new checksums, and go on with the old weights.
2. Experts' weights are packed again after an update. vLLM packs them at the start only, so that the
   kernel would read plain weights as packed ones.
3. Weight transfer has a backend `gloo`, which takes the requests of vLLM's own `nccl` backend (not
   packed) and receives by gloo: one broadcast from rank 0 for each tensor, in the order of the names.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed import rendezvous
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

_custom_ops._supports_onednn = False
_set_up_experts = UnquantizedFusedMoEMethod._setup_kernel


def _set_up_and_pack_experts(self: Any, layer: Any, w13: Any, w2: Any) -> None:
    is_update = self.moe_kernel is not None
    _set_up_experts(self, layer, w13, w2)
    if is_update:
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)


UnquantizedFusedMoEMethod._setup_kernel = _set_up_and_pack_experts

TIMEOUT = timedelta(seconds=120)
"""Longest wait for the trainer, at the start and in each broadcast."""

GROUP = "weight_update_group"
"""The prefix of the rendezvous' keys; the trainer uses the same."""


class CpuWorkerExtension:
    """Adds no method: the import of this module is what is wanted."""


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """The `nccl` backend's requests and layer-wise reload, with gloo's broadcasts."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Joins the trainer's group as rank ``rank_offset + worker``."""
        if init_info.packed:
            raise ValueError("the gloo backend takes packed=false only")
        workers = self.parallel_config.world_size
        worker = self.parallel_config.data_parallel_index * workers + self.parallel_config.rank
        rank = init_info.rank_offset + worker
        address = f"tcp://{init_info.master_address}:{init_info.master_port}"
        store, rank, world = next(rendezvous(address, rank, init_info.world_size, timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        self._gloo, _ = c10d._new_process_group_helper(
            world, rank, [], c10d.Backend("gloo"), c10d.PrefixStore(GROUP, store),
            group_name=GROUP, backend_options=None, timeout=TIMEOUT, device_id=None,
        )  # fmt: skip
        c10d._world.pg_group_ranks[self._gloo] = {i: i for i in range(world)}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does, without waiting for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receives and loads tensor by tensor."""
        rows = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in rows:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(tensor, src=0, group=self._gloo)
            self.model.load_weights([(name, tensor)])

    def shutdown(self) -> None:
        """Leaves the group."""
        if getattr(self, "_gloo", None) is not None:
            dist.destroy_process_group(self._gloo)
            self._gloo = None


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
