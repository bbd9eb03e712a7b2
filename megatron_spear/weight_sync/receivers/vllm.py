"""vLLM's end of weight updates: a weight-transfer backend for ``broadcast`` and ``sharded``.

Servers are started with ``--worker-extension-cls
megatron_spear.weight_sync.receivers.vllm.WorkerExtension`` and ``--weight-transfer-config
'{"backend": "megatron_spear"}'``; this package is on their PYTHONPATH. Requests, as
``rollout.engines.vllm`` sends them:

    init_info     where the broadcasts' group meets, and the first rank of this server
    update_info   names, dtype_names, shapes: one broadcast of all their bytes from rank 0
                  a list, for each rank {"payload": base64}: its message of ``sharded``
"""

import base64
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_spear import peer_groups
from megatron_spear.weight_sync.receivers.places import locate
from megatron_spear.weight_sync.sharded.receiver import Receiver
from megatron_spear.weight_sync.sharded.records import HeldTensor

BACKEND = "megatron_spear"
TIMEOUT_S = 600.0
"""Longest wait for the trainer, when a group is made and in each broadcast."""


class WorkerExtension:
    """Adds no method: that a worker imports this module makes the backend known there."""


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the group of the broadcasts meets."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str
    group_backend: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The tensors of one broadcast, or one rank's payload; ``load_format`` is of use to SGLang."""

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    payload: str = field(default="", repr=False)
    load_format: str | None = None


class Transfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Broadcasts go through vLLM's loader, layer by layer; slices into the parameters as they
    are."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _group: dist.ProcessGroup | None = None
    _receiver: Receiver | None = None
    _reloading = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the trainer's group; a worker's rank is its own plus ``rank_offset``."""
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._leave_group()
        self._group = peer_groups.join(
            backend=init_info.group_backend,
            host=init_info.master_address,
            port=init_info.master_port,
            rank=init_info.rank_offset + worker,
            world_size=init_info.world_size,
            name=init_info.group_name,
            timeout_s=TIMEOUT_S,
        )

    def start_weight_update(self) -> None:
        """Nothing yet: the first tensors tell in which form they come."""
        self._reloading = False

    def finish_weight_update(self) -> None:
        """Bring reloaded layers into the form that the kernels use."""
        if self._reloading:
            self._reloading = False
            finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does, but for the wait for an accelerator where there is none."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take part in one call of an update."""
        if update_info.payload:
            self._receive_slices(update_info.payload)
        else:
            self._receive_broadcast(update_info)

    def shutdown(self) -> None:
        """Leave the trainer's groups."""
        self._leave_group()
        if self._receiver is not None:
            self._receiver.close()

    def _receive_broadcast(self, info: UpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("no group was joined: call init_weight_transfer_engine first")
        if not self._reloading:
            initialize_layerwise_reload(self.model)
            self._reloading = True
        dtypes = [getattr(torch, name) for name in info.dtype_names]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize
            for shape, dtype in zip(info.shapes, dtypes, strict=True)
        ]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        dist.broadcast(flat, src=0, group=self._group)
        parts = zip(info.names, flat.split(sizes), dtypes, info.shapes, strict=True)
        self.model.load_weights(
            [(name, part.view(dtype).view(shape)) for name, part, dtype, shape in parts]
        )

    def _receive_slices(self, payload: str) -> None:
        """The trainer is told what went wrong; the worker goes on in any case."""
        if self._receiver is None:
            self._receiver = Receiver()
        parameters = dict(self.model.named_parameters())

        def places(tensors: Sequence[HeldTensor]) -> list[Tensor]:
            if any(".experts." in held.name for held in tensors):
                raise ValueError(
                    "vLLM may hold experts in an order of its kernels' own, which their shapes do "
                    "not show; use weight_sync.transport=broadcast"
                )
            return locate(tensors, parameters)

        named = pickle.loads(base64.b64decode(payload))
        self._receiver.update([tensor for _, tensor in named], places)

    def _leave_group(self) -> None:
        if self._group is not None:
            peer_groups.leave(self._group)
            self._group = None


WeightTransferEngineFactory.register_engine(BACKEND, Transfer)
