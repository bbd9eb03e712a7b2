"""Weights as handles of memory that trainer and engines of one machine share: no copy travels.

On a GPU these are CUDA IPC handles: each of the server's processes has to see the trainer's device
under the same number. On a CPU they are files in /dev/shm. Each process of a server gets a pickle
of its own, for torch counts the readers of a handle.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.multiprocessing
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_spear.errors import EngineError
from megatron_spear.weight_sync.buckets import Bucket, pack
from megatron_spear.weight_sync.servers import UpdateServer
from megatron_spear.weight_sync.update import Update, send_buckets

_SHARED = Path("/dev/shm")
FORMAT = "flattened_bucket"
"""The ``load_format`` of a bucket's payload."""


class Ipc:
    """A ``Delivery`` by shared memory on ``device``, in buckets; the next one is packed while the
    servers copy one.

    On a CPU torch starts its ``torch_shm_manager``, which keeps the process's stdout open until a
    few seconds after its end.
    """

    def __init__(self, *, bucket_bytes: int, device: torch.device) -> None:
        self._bucket_bytes = bucket_bytes
        self._device = device
        self._files: dict[Path, StorageWeakRef] = {}

    def deliver(self, update: Update, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        """See ``Delivery``."""
        self._remove_unread()

        def send(bucket: Bucket, server: UpdateServer) -> "Future[None]":
            payloads = [payload_of(bucket) for _ in range(server.num_ranks)]
            return server.receive_payloads(payloads, FORMAT, update.policy_version)

        sent = send_buckets(update, pack(tensors, self._bucket_bytes, self._allocate), send)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()
        return sent

    def close(self) -> None:
        """Remove what no server has read."""
        self._remove_unread()

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        if self._device.type == "cuda":
            return memory
        try:
            with _shared_by_files():
                memory.share_memory_()
                _, file, _ = memory.untyped_storage()._share_filename_cpu_()
        except RuntimeError as error:
            raise EngineError(
                f"no shared memory of {num_bytes} bytes ({error}); make /dev/shm larger or "
                "weight_sync.bucket_bytes smaller"
            ) from error
        self._files[_SHARED / file.decode().lstrip("/")] = StorageWeakRef(memory.untyped_storage())
        return memory

    def _remove_unread(self) -> None:
        """torch removes a file when its last reader is done: never, if a server failed before it
        read. By the next update such a server is no reader any more."""
        for path, storage in list(self._files.items()):
            if storage.expired():
                path.unlink(missing_ok=True)
                del self._files[path]


def payload_of(bucket: Bucket) -> bytes:
    """The pickle that SGLang's update_weights_from_tensor takes as ``flattened_bucket``.

    The bucket's memory has to stay as it is until the reader has answered.
    """
    if bucket.data.is_cuda:
        torch.cuda.current_stream(bucket.data.device).synchronize()
    described, start = [], 0
    for spec in bucket.tensors:
        end = start + spec.num_bytes
        described.append(
            SimpleNamespace(
                name=spec.name,
                shape=torch.Size(spec.shape),
                dtype=spec.dtype,
                start_idx=start,
                end_idx=end,
                numel=spec.num_bytes,  # SGLang counts bytes here
            )
        )
        start = end
    with _shared_by_files():
        return bytes(ForkingPickler.dumps({"flattened_tensor": bucket.data, "metadata": described}))


@contextmanager
def _shared_by_files() -> Iterator[None]:
    """torch shares CPU memory by name: its default hands over a file descriptor, which kills an
    engine that is no child of this process."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
