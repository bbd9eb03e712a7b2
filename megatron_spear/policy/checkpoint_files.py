"""Megatron's writing of checkpoint files: in this process, at once or in a thread, errors kept.

Megatron writes its files from forked processes with a queue held by a spawned one, which for a
small model takes far longer than the writing and re-imports the main script; here the same code
writes from this process. It also lets rank 0 write small files alone between two collectives, so an
error there would leave the other ranks waiting; here such an error is kept until all ranks can hear
of it.

Megatron's request has three parts: planning (collective), writing (each rank by itself, no
collective) and finishing (collective). Only the writing may run beside the training.
"""

import contextlib
import functools
import inspect
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import common, filesystem_async

from megatron_spear.background import in_background

_PARALLEL_WRITERS = ("write_preloaded_data_multiproc", "write_preloaded_data_multithread")
_WRITE_ERRORS = (OSError, RuntimeError)
_HAS_STRATEGIES = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters


class FilesToWrite:
    """A state dict's files, planned; ``start_writing`` if they can wait, then ``complete``."""

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        """Plan; collective. ``state`` is Megatron's sharded state dict."""
        self._of_state = _storages(state)
        own_writer = {"async_strategy": "mcore"} if _HAS_STRATEGIES else {}
        with _write_in_this_process():
            self._request = dist_checkpointing.save(
                state, str(folder), ("torch_dist", 1), async_sharded_save=True, **own_writer
            )
        self._writing: Future[None] | None = None
        self._abandoned = threading.Event()

    def start_writing(self) -> "Future[None]":
        """Copy this rank's part to host memory and write it in a thread."""
        self._writing = in_background(self._writer(copy=True), "checkpoint files")
        return self._writing

    def complete(self) -> None:
        """Wait for this rank's files, or write them now if they were not begun; then write what
        describes the whole. Collective; raises on all ranks if one of them could not write."""
        if self._writing is not None:
            wait([self._writing])
        else:
            self._writer(copy=False)()
        for finalize in self._request.finalize_fns:
            finalize()

    def abandon(self) -> None:
        """Let the thread stop at its next tensor; the files are of no use then."""
        self._abandoned.set()

    def _writer(self, *, copy: bool) -> Callable[[], None]:
        """The function that writes this rank's files; with ``copy`` it uses nothing that training
        changes."""
        if self._request.async_fn is None:  # nothing to write on this rank
            return lambda: None
        rank, buckets, results = self._request.async_fn_args
        used = self._of_state if copy else set()
        buckets = _on_host(buckets, self._until_abandoned, used)
        return functools.partial(self._request.async_fn, rank, buckets, results)

    def _until_abandoned(self, tensors: Iterable[Any]) -> Iterator[Any]:
        for tensor in tensors:
            if self._abandoned.is_set():
                raise RuntimeError("the save was abandoned")
            yield tensor


def _on_host(
    buckets: list[Any], watched: Callable[[Iterable[Any]], Iterator[Any]], used: set[int]
) -> list[Any]:
    """The buckets with their tensors in host memory; copied are also those there whose memory is
    ``used`` by others. (Megatron has copied parts of tensors already.)"""

    def on_host(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.untyped_storage().data_ptr() in used
        return tensor.to("cpu", non_blocking=True, copy=copy)

    found = [
        (path, name, (blobs, [(i, on_host(t)) for i, t in tensors]))
        for path, name, (blobs, tensors) in buckets
    ]
    torch.cuda.synchronize()
    return [(path, name, (blobs, watched(rest))) for path, name, (blobs, rest) in found]


def _storages(state: dict[str, Any]) -> set[int]:
    """Where the tensors of a sharded state dict lie."""
    values = (getattr(value, "data", None) for value in nested_values(state))
    return {v.untyped_storage().data_ptr() for v in values if isinstance(v, torch.Tensor)}


@contextlib.contextmanager
def errors_kept() -> Iterator[list[Exception]]:
    """Inside, errors of Megatron's files that rank 0 writes alone go to the list instead.

    These are ``metadata.json``, ``.metadata`` and, in 0.16, ``common.pt``.
    """
    places: list[tuple[Any, str]] = [
        (serialization, "save_config"),
        (filesystem_async.FileSystemWriterAsync, "finish"),
    ]
    if hasattr(common, "TorchCommonSaveStrategy"):
        places.append((common.TorchCommonSaveStrategy, "save_common"))
    errors: list[Exception] = []

    def keeping(write: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except _WRITE_ERRORS as error:
                errors.append(error)

        return attempt

    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, write in originals:
        setattr(owner, name, keeping(write))
    try:
        yield errors
    finally:
        for owner, name, write in originals:
            setattr(owner, name, write)


@contextlib.contextmanager
def _write_in_this_process() -> Iterator[None]:
    """Requests planned inside have a plain queue and ``_write_buckets`` instead of Megatron's
    worker processes (0.16) or threads (0.19), which hide what went wrong or let it out on one rank
    alone."""
    writer = filesystem_async.FileSystemWriterAsync
    (name,) = (name for name in _PARALLEL_WRITERS if hasattr(writer, name))
    original = getattr(writer, name)
    filesystem_async._results_queue = queue.Queue()
    setattr(writer, name, staticmethod(_write_buckets))
    try:
        yield
    finally:
        filesystem_async._results_queue = None
        setattr(writer, name, staticmethod(original))


def _write_buckets(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any
) -> None:
    """One file after the other; ``results`` gets what was written by number, or the error."""
    written: Any = {}
    for number, bucket in enumerate(buckets):
        done: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[Any] = queue.Queue()
        pending.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, done, pending, use_fsync=True
        )
        _, outcome = done.get_nowait()
        if isinstance(outcome, Exception):
            hidden = outcome.__context__  # behind torch's "unexpected pos"
            written = hidden if isinstance(hidden, OSError) else outcome
            break
        written[number] = outcome
    results.put(written)
