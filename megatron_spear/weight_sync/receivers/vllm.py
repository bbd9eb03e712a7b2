"""vLLM's end of the ``sharded`` transport: a weight-transfer backend.

Servers are started with ``--worker-extension-cls
megatron_spear.weight_sync.receivers.vllm.WorkerExtension`` and ``--weight-transfer-config
'{"backend": "megatron_spear"}'``; this package is on their PYTHONPATH. The ``update_info`` of an
update is a list, for each rank ``{"payload": base64}`` of what SGLang's ranks get.
"""

import base64
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_spear.weight_sync.receivers.places import locate
from megatron_spear.weight_sync.sharded.receiver import Receiver
from megatron_spear.weight_sync.sharded.records import HeldTensor

BACKEND = "megatron_spear"


class WorkerExtension:
    """Adds no method: that a worker imports this module makes the backend known there."""


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: each payload says where to meet."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One rank's payload; ``load_format`` is of use to SGLang only."""

    payload: str = field(repr=False)
    load_format: str | None = None


class ShardedTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Receives slices into the parameters as they are; no loader of vLLM's runs."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: parameters stay in the form that the kernels use."""

    def finish_weight_update(self) -> None:
        """Nothing to do."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does, without waiting for an accelerator: receiving has waited."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take part in one update; the trainer is told what went wrong."""
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

        named = pickle.loads(base64.b64decode(update_info.payload))
        self._receiver.update([tensor for _, tensor in named], places)

    def shutdown(self) -> None:
        """Leave the trainer's group."""
        if self._receiver is not None:
            self._receiver.close()


WeightTransferEngineFactory.register_engine(BACKEND, ShardedTransfer)
