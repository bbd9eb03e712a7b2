"""A rank of a fake engine server, in a process of its own: it receives for real and can fail.

``testing.servers`` starts these processes and asks them.
"""

import os
import pickle
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.weight_sync.buckets import Bucket, unpack
from megatron_spear.weight_sync.servers import GroupAddress, TensorSpec


class _Refused(Exception):
    """What the process answers instead of doing it."""


class _Rank:
    """A rank of a server: what it holds, and the methods it can be asked for."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.version_held: int | None = None
        self._open = False
        self._device = torch.device("cpu")
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._groups: dict[str, Any] = {}
        self._faults: dict[str, tuple[str, int]] = {}

    def answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        kind, left = self._faults.get(method, ("", 0))
        if kind:
            self._faults[method] = (kind, left - 1)
        if left == 1:
            del self._faults[method]
            if kind == "die":
                os._exit(1)
            if kind == "late":
                time.sleep(1000.0)  # killed by then
            raise _Refused(f"told to refuse {method}")
        return getattr(self, method)(*arguments)

    def fail(self, method: str, kind: str, call: int) -> None:
        self._faults[method] = (kind, call)

    def held(self) -> dict[str, tuple[torch.Tensor, torch.dtype, torch.Size]]:
        # As bytes: torch's plain pickle does not know FP8.
        return {
            name: (tensor.reshape(-1).view(torch.uint8).cpu(), tensor.dtype, tensor.shape)
            for name, tensor in self.weights.items()
        }

    def version(self) -> int | None:
        return self.version_held

    def begin_update(self) -> None:
        self._open = True

    def end_update(self, policy_version: int) -> None:
        self._expect_open()
        self._open, self.version_held = False, policy_version

    def load_folder(self, folder: str, policy_version: int) -> None:
        with HfReader(Path(folder)) as reader:
            self.weights |= {name: reader.get(name).clone() for name in reader.names}
        self.version_held = policy_version

    def join_group(self, group: GroupAddress, rank: int) -> None:
        if group.backend == "nccl":
            self._device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(self._device)
        self._groups[group.name] = peer_groups.join(
            backend=group.backend,
            host=group.host,
            port=group.port,
            rank=rank,
            world_size=group.world_size,
            name=group.name,
            timeout_s=60.0,  # without a device, as SGLang joins
        )

    def leave_group(self, name: str) -> None:
        if name not in self._groups:
            raise _Refused(f"group {name} does not exist")
        peer_groups.leave(self._groups.pop(name))

    def receive_broadcast(
        self, tensors: Sequence[TensorSpec], group: str, policy_version: int
    ) -> None:
        self._expect_open()
        size = sum(spec.num_bytes for spec in tensors)
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        data = self._buffer[:size]
        dist.broadcast(data, src=0, group=self._groups[group])
        self._take(Bucket(tensors=tuple(tensors), data=data))

    def receive_payloads(
        self, payload: bytes, load_format: str | None, policy_version: int
    ) -> None:
        self._expect_open()
        content = pickle.loads(payload)
        if load_format != "flattened_bucket":
            self.weights |= {name: tensor.clone() for name, tensor in content}
            return
        specs = [
            TensorSpec(name=m.name, shape=tuple(m.shape), dtype=m.dtype)
            for m in content["metadata"]
        ]
        self._take(Bucket(tensors=tuple(specs), data=content["flattened_tensor"]))

    def _take(self, bucket: Bucket) -> None:
        for name, tensor in unpack(bucket):
            old = self.weights.get(name)
            if old is not None and (old.shape, old.dtype) == (tensor.shape, tensor.dtype):
                old.copy_(tensor)  # as an engine does, into memory that is there
            else:
                self.weights[name] = tensor.clone()
        if bucket.data.is_cuda:
            torch.cuda.synchronize()  # the answer says that the bucket may be overwritten

    def _expect_open(self) -> None:
        if not self._open:
            raise _Refused("no update is open")


def serve_rank(address: str) -> None:
    """A rank's process: one client at a time, asked and answered in turn."""
    torch.set_num_threads(1)
    rank = _Rank()
    with Listener(address, family="AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                _answer_all(rank, connection)


def _answer_all(rank: _Rank, connection: Connection) -> None:
    while True:
        try:
            method, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        problem = value = None
        try:
            value = rank.answer(method, arguments)
        except (_Refused, RuntimeError, ValueError, KeyError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
        connection.send_bytes(pickle.dumps((problem, value)))
