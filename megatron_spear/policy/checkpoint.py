"""Model and optimizer state on disk, whatever the layout, by Megatron's dist_checkpointing.

Megatron writes its files from forked processes with a queue held by a spawned one, which for a
small model takes far longer than the writing and re-imports the main script; here the same code
writes from this process. It also lets rank 0 write small files alone between two collectives, so an
error there would leave the other ranks waiting; here such an error is kept until all ranks can hear
of it. What is done by one rank alone ends in an agreement: it went well on all ranks, or each
raises CheckpointError.

Whether the files are still what was written is not checked here: the run's checkpoints have a
manifest with hashes (``trainer.commit``).
"""

import contextlib
import functools
import json
import logging
import pickle
import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spear.errors import CheckpointError
from megatron_spear.policy import cpu, fp8, optimizer_state
from megatron_spear.policy.parallel import ParallelContext

logger = logging.getLogger(__name__)

STATE_FILE = "policy.json"
FORMAT = 1

_PARALLEL_WRITERS = ("write_preloaded_data_multiproc", "write_preloaded_data_multithread")
_WRITE_ERRORS = (OSError, RuntimeError)
_LIBRARY_ERRORS = (
    CheckpointException,  # torch's, of a collective save or load; no Exception
    CheckpointingException,  # Megatron's, of state that does not fit
    RuntimeError,  # torch's, of a file or tensor that does not fit
    OSError,
    EOFError,
    KeyError,
    ValueError,
    pickle.UnpicklingError,
)
"""What torch and Megatron raise for files that cannot be written, are damaged or do not fit."""


def save(
    folder: Path, chunks: Sequence[Any], optimizer: Any, num_steps: int, ctx: ParallelContext
) -> None:
    """Write everything that training needs to go on after ``num_steps`` steps; collective.

    ``folder`` is made if need be and must be empty; putting it in place as one commit is the
    caller's affair. ``policy.json`` is written last. Raises CheckpointError on every rank if one of
    them cannot write.
    """

    def begin() -> None:
        if ctx.is_controller:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise CheckpointError(f"{folder} is not empty; give a new folder to save into")

    def write() -> None:
        with cpu.cuda_means_cpu(), _write_in_this_process(), _errors_kept() as errors:
            state = _state(chunks, optimizer, num_steps, loading=False)
            dist_checkpointing.save(state, str(folder), ("torch_dist", 1))
        if errors:
            raise errors[0]

    def end() -> None:
        if ctx.is_controller:
            split = optimizer_state.is_distributed(optimizer)
            state = {"format": FORMAT, "num_steps": num_steps, "distributed_optimizer": split}
            (folder / STATE_FILE).write_text(json.dumps(state))

    for action in (begin, write, end):
        _agree(action, f"{folder} cannot be written", ctx)


def load(folder: Path, chunks: Sequence[Any], optimizer: Any, ctx: ParallelContext) -> int:
    """Restore what ``save`` wrote, at any layout; the number of optimizer steps taken. Collective.

    Raises CheckpointError on every rank if a file is missing, damaged or of another model.
    """
    misfit = "the checkpoint does not fit or is damaged"
    split = optimizer_state.is_distributed(optimizer)
    num_steps, stored = _agree(lambda: _read_alone(folder, split), misfit, ctx)

    def restore() -> None:
        with cpu.cuda_means_cpu():
            request = _state(chunks, optimizer, num_steps, loading=True)
            missing = _without_missing_extras(request, stored)
            state = dist_checkpointing.load(request, str(folder))
            for number, chunk in enumerate(chunks):
                chunk.load_state_dict(state[f"model{number}"] | missing[number])
            if num_steps:
                optimizer_state.restore(optimizer, state["optimizer"])
            else:
                optimizer.reload_model_params()

    _agree(restore, misfit, ctx)
    return int(num_steps)


def _state(chunks: Sequence[Any], optimizer: Any, num_steps: int, loading: bool) -> dict[str, Any]:
    """What is stored; before the first step the optimizer has no state worth it."""
    weights = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    state = dict(weights)
    if num_steps:
        state["optimizer"] = optimizer_state.sharded_state(optimizer, weights, loading=loading)
    fp8.make_plain(weights)
    return state


def _without_missing_extras(request: dict[str, Any], stored: set[str]) -> list[dict[str, None]]:
    """Take out of ``request`` the layers' extra states (FP8 scales) that are not ``stored``.

    Gives them by name, for each piece of the model, as None, which a layer passes over. Layers of
    another implementation stored other ones, and TransformerEngine's have some without content.
    """
    found = []
    for number in range(sum(key.startswith("model") for key in request)):
        own = request[f"model{number}"]
        names = [
            name
            for name, entry in own.items()
            if name.endswith("_extra_state")
            and isinstance(entry, ShardedObject)
            and entry.unique_key not in stored
        ]
        found.append(dict.fromkeys(names))
        for name in names:
            del own[name]
    return found


def _read_alone(folder: Path, distributed: bool) -> tuple[int, set[str]]:
    """``num_steps`` and the keys of what is stored.

    Reads all that each rank reads by itself before Megatron's first collective: a rank that cannot
    is found here, where the others do not wait for it yet. Refuses the state of an optimizer that
    is not as ``distributed`` as the present one.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_FILE}: not a policy checkpoint, or its saving was cut off"
        )
    state = json.loads(file.read_text())
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {state.get('format')!r}, this version reads {FORMAT}"
        )
    stored = state.get("distributed_optimizer", False)
    if state["num_steps"] and stored != distributed:
        raise CheckpointError(
            f"{folder} was saved with policy.distributed_optimizer={str(stored).lower()}, which "
            f"stores the optimizer in another way than {str(distributed).lower()}; set it to "
            f"{str(stored).lower()}"
        )
    dist_checkpointing.load_common_state_dict(str(folder))
    return int(state["num_steps"]), set(serialization.load_sharded_metadata(str(folder)))


def _agree(action: Callable[[], Any], failed: str, ctx: ParallelContext) -> Any:
    """Run on all ranks; if it fails on one, a CheckpointError on each, so that none waits.

    ``failed`` says what an error of torch or Megatron means.
    """
    problem, result = "", None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except _LIBRARY_ERRORS as error:
        logger.debug("checkpoint error", exc_info=True)
        cause = _cause(error)
        problem = f"{failed}: {type(cause).__name__}: {cause}"
    problems: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(problems, problem, group=ctx.control)
    for text in problems:
        if text:
            raise CheckpointError(text)
    return result


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed, out of torch's collection with tracebacks.

    Megatron hands that collection to rank 0 only; ranks with an empty one have nothing to add.
    """
    if isinstance(error, CheckpointException) and error.failures:
        first: BaseException = next(iter(error.failures.values()))[0]
        return first
    return error


@contextlib.contextmanager
def _errors_kept() -> Iterator[list[Exception]]:
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
    """Megatron's file writer with a plain queue and without its worker processes (0.16) or threads
    (0.19), which hide what went wrong or let it out on one rank alone."""
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
