"""SGLang's end of the ``sharded`` transport: a custom weight loader.

Servers are started with ``--custom-weight-loader megatron_spear.weight_sync.receivers.sglang.load``
and this package on their PYTHONPATH; their environment needs nothing else of ours.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_spear.weight_sync.receivers.places import locate
from megatron_spear.weight_sync.sharded.receiver import Receiver
from megatron_spear.weight_sync.sharded.records import HeldTensor

_receiver = Receiver()


def load(model: torch.nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take part in one update; SGLang calls it in each tensor-parallel rank with its own payload.

    ``named_tensors`` has one entry, the message. Never raises, since that would end the server; the
    trainer is told what went wrong and takes the server out.
    """
    parameters = dict(model.named_parameters())

    def places(tensors: Sequence[HeldTensor]) -> list[Tensor]:
        return locate(tensors, parameters, lambda name: _up_first(model, name))

    _receiver.update([tensor for _, tensor in named_tensors], places)


def _up_first(model: torch.nn.Module, parameter: str) -> bool:
    """Whether the module's kernel wants an expert's up projection before its gate."""
    module: Any = model.get_submodule(parameter.rpartition(".")[0])
    method = getattr(module, "quant_method", None)
    return bool(getattr(method, "load_up_proj_weight_first", False))
