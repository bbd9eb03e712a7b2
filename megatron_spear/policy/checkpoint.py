"""Model and optimizer state on disk, whatever the layout, by Megatron's dist_checkpointing.

Megatron writes its files from forked processes with a queue held by a spawned one, which for a
small model takes far longer than the writing and re-imports the main script; here the same code
writes from this process. Next to Megatron's files, ``files.json`` holds every file's size and
CRC-32, which ``load`` checks before it touches the model.
"""

import contextlib
import json
import logging
import queue
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spear.errors import CheckpointError
from megatron_spear.policy import cpu
from megatron_spear.policy.parallel import ParallelContext

logger = logging.getLogger(__name__)

MANIFEST = "files.json"
FORMAT = 1


def save(folder: Path, model: Any, optimizer: Any, num_steps: int, ctx: ParallelContext) -> None:
    """Write everything that training needs to go on after ``num_steps`` steps; collective.

    ``folder`` is made if need be and must be empty; putting it in place as one commit is the
    caller's affair. ``files.json`` is written last.
    """
    if ctx.is_controller:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty; give a new folder to save into")
    dist.barrier(group=ctx.control)
    with cpu.cuda_means_cpu(), _write_in_this_process():
        dist_checkpointing.save(
            _state(model, optimizer, num_steps, loading=False), str(folder), ("torch_dist", 1)
        )
    own = [
        file for file in sorted(folder.glob("*")) if _owner(file.name) % ctx.world_size == ctx.rank
    ]
    sums = _gather([(file.name, file.stat().st_size, _crc(file)) for file in own], ctx)
    if ctx.is_controller:
        manifest = {"format": FORMAT, "num_steps": num_steps, "files": sorted(sums)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    dist.barrier(group=ctx.control)


def load(folder: Path, model: Any, optimizer: Any, ctx: ParallelContext) -> int:
    """Restore what ``save`` wrote, at any layout; the number of optimizer steps taken. Collective.

    Raises CheckpointError on every rank if a file is missing, damaged or of another model.
    """
    manifest = _agree(lambda: _read_manifest(folder), ctx)
    _agree(lambda: _check_files(folder, manifest["files"], ctx), ctx)
    num_steps = int(manifest["num_steps"])

    def restore() -> None:
        with cpu.cuda_means_cpu():
            request = _state(model, optimizer, num_steps, loading=True)
            state = dist_checkpointing.load(request, str(folder))
            model.load_state_dict(state["model"])
            if num_steps:
                optimizer.load_state_dict(state["optimizer"])
            else:
                optimizer.reload_model_params()

    _agree(restore, ctx)
    return num_steps


def _state(model: Any, optimizer: Any, num_steps: int, loading: bool) -> dict[str, Any]:
    """What is stored; the optimizer has no state before its first step."""
    weights = model.sharded_state_dict()
    if not num_steps:
        return {"model": weights}
    state = optimizer.sharded_state_dict(weights, is_loading=loading)
    return {"model": weights, "optimizer": state}


def _read_manifest(folder: Path) -> Any:
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: not a policy checkpoint, or one whose saving was cut off"
        )
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {manifest.get('format')!r}, this version reads {FORMAT}"
        )
    return manifest


def _check_files(folder: Path, files: list[list[Any]], ctx: ParallelContext) -> None:
    """Size and CRC of this rank's share of the files."""
    for name, size, crc in files[ctx.rank :: ctx.world_size]:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint is incomplete")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, {size} were written; it is truncated"
            )
        if _crc(file) != crc:
            raise CheckpointError(f"{file} has changed since it was written (CRC-32 differs)")


def _owner(name: str) -> int:
    """The rank that wrote the file: Megatron names them ``__RANK_NUMBER.distcp``."""
    rank = name.removeprefix("__").split("_")[0]
    return int(rank) if name.startswith("__") and rank.isdigit() else 0


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _gather(mine: list[Any], ctx: ParallelContext) -> list[Any]:
    parts: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(parts, mine, group=ctx.control)
    return [item for part in parts for item in part]


def _agree(action: Callable[[], Any], ctx: ParallelContext) -> Any:
    """Run on all ranks; if it fails on one, a CheckpointError on each, so that none waits."""
    problem, result = "", None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        logger.debug("checkpoint error", exc_info=True)
        cause = _cause(error)
        problem = f"the checkpoint does not fit or is damaged: {type(cause).__name__}: {cause}"
    problems: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(problems, problem, group=ctx.control)
    for text in problems:
        if text:
            raise CheckpointError(text)
    return result


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed, out of torch's collection with tracebacks."""
    if isinstance(error, CheckpointException):
        first: BaseException = next(iter(error.failures.values()))[0]
        return first
    return error


@contextlib.contextmanager
def _write_in_this_process() -> Iterator[None]:
    """Megatron's file writer with a plain queue and, in 0.16, without its worker processes."""
    writer = filesystem_async.FileSystemWriterAsync
    forking = getattr(writer, "write_preloaded_data_multiproc", None)
    filesystem_async._results_queue = queue.Queue()
    if forking is not None:
        writer.write_preloaded_data_multiproc = staticmethod(_write_buckets)
    try:
        yield
    finally:
        filesystem_async._results_queue = None
        if forking is not None:
            writer.write_preloaded_data_multiproc = staticmethod(forking)


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
            written = outcome
            break
        written[number] = outcome
    results.put(written)
