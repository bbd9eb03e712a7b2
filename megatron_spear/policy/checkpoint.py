"""Model and optimizer state on disk, whatever the layout, by Megatron's dist_checkpointing.

What is done by one rank alone ends in an agreement: it went well on all ranks, or each raises
CheckpointError. The writing itself may go on beside the training (``begin_save``).

Whether the files are still what was written is not checked here: the run's checkpoints have a
manifest with hashes (``trainer.commit``).
"""

import json
import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spear.errors import CheckpointError
from megatron_spear.policy import cpu, fp8, optimizer_state, random_state
from megatron_spear.policy.checkpoint_files import FilesToWrite, errors_kept
from megatron_spear.policy.parallel import ParallelContext

logger = logging.getLogger(__name__)

STATE_FILE = "policy.json"
FORMAT = 1

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """``steps`` of the learning-rate schedule, and ``updates`` of the optimizer: those and the ones
    for which the schedule stands still."""

    steps: int
    updates: int


class PendingSave:
    """A save that was begun: the files are being written by a thread of each rank.

    What they hold is the state at ``begin_save``; training may go on.
    """

    def __init__(
        self, folder: Path, files: FilesToWrite, about: dict[str, Any], ctx: ParallelContext
    ) -> None:
        self._folder, self._files, self._about, self._ctx = folder, files, about, ctx
        self.writing = files.start_writing()
        """Done once this rank's files are written, or could not be."""

    def finish(self) -> None:
        """Wait for the writing and complete the checkpoint; collective.

        Raises CheckpointError on every rank if one of them could not write.
        """
        _complete(self._folder, self._files, self._about, self._ctx)

    def abandon(self) -> None:
        """Stop writing soon; on one rank or all. What was written is for the caller to remove."""
        self._files.abandon()


def save(
    folder: Path, chunks: Sequence[Any], optimizer: Any, counts: Counts, ctx: ParallelContext
) -> None:
    """Write everything that training needs to go on after so many steps; collective.

    ``folder`` is made if need be and must be empty; putting it in place as one commit is the
    caller's affair. ``policy.json`` is written last. Raises CheckpointError on every rank if one of
    them cannot write.
    """
    files, about = _plan(folder, chunks, optimizer, counts, ctx)
    _complete(folder, files, about, ctx)


def begin_save(
    folder: Path, chunks: Sequence[Any], optimizer: Any, counts: Counts, ctx: ParallelContext
) -> PendingSave:
    """``save``, but only the copying to host memory is waited for; ``finish`` the result."""
    files, about = _plan(folder, chunks, optimizer, counts, ctx)
    begun: PendingSave = _agree(
        lambda: PendingSave(folder, files, about, ctx), _unwritten(folder), ctx
    )
    return begun


def _plan(
    folder: Path, chunks: Sequence[Any], optimizer: Any, counts: Counts, ctx: ParallelContext
) -> tuple[FilesToWrite, dict[str, Any]]:
    """What to write: Megatron's files, and the contents of ``policy.json``."""

    def begin() -> None:
        if ctx.is_controller:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise CheckpointError(f"{folder} is not empty; give a new folder to save into")

    def plan() -> FilesToWrite:
        with cpu.cuda_means_cpu(), errors_kept() as errors:
            state = _state(chunks, optimizer, counts, loading=False)
            state["rng"] = random_state.sharded_state(ctx)
            planned = FilesToWrite(state, folder)
        if errors:
            raise errors[0]
        return planned

    _agree(begin, _unwritten(folder), ctx)
    files = _agree(plan, _unwritten(folder), ctx)
    about = {
        "format": FORMAT,
        "num_steps": counts.steps,
        "num_updates": counts.updates,
        "distributed_optimizer": optimizer_state.is_distributed(optimizer),
        "rng_layout": random_state.layout(ctx),
    }
    return files, about


def _complete(
    folder: Path, files: FilesToWrite, about: dict[str, Any], ctx: ParallelContext
) -> None:
    """This rank's files, if no thread writes them, and what comes after them."""

    def complete() -> None:
        with cpu.cuda_means_cpu(), errors_kept() as errors:
            files.complete()
        if errors:
            raise errors[0]

    def end() -> None:
        if ctx.is_controller:
            (folder / STATE_FILE).write_text(json.dumps(about))

    for action in (complete, end):
        _agree(action, _unwritten(folder), ctx)


def _unwritten(folder: Path) -> str:
    return f"{folder} cannot be written"


def load(folder: Path, chunks: Sequence[Any], optimizer: Any, ctx: ParallelContext) -> Counts:
    """Restore what ``save`` wrote, at any layout; the steps and updates so far. Collective.

    The random generators are taken back at the layout they were saved at, else seeded anew. Raises
    CheckpointError on every rank if a file is missing, damaged or of another model.
    """
    misfit = "the checkpoint does not fit or is damaged"
    split = optimizer_state.is_distributed(optimizer)
    about, stored = _agree(lambda: _read_alone(folder, split), misfit, ctx)
    counts, rng_layout = _counts(about), about.get("rng_layout")
    same_layout = rng_layout == random_state.layout(ctx)

    def restore() -> None:
        with cpu.cuda_means_cpu():
            request = _state(chunks, optimizer, counts, loading=True)
            if same_layout:
                request["rng"] = random_state.sharded_state(ctx)
            missing = _without_missing_extras(request, stored)
            state = dist_checkpointing.load(request, str(folder))
            for number, chunk in enumerate(chunks):
                chunk.load_state_dict(state[f"model{number}"] | missing[number])
            if counts.updates:
                optimizer_state.restore(optimizer, state["optimizer"])
            else:
                optimizer_state.reload_weights(optimizer)
            if same_layout:
                random_state.restore(state["rng"])
            else:
                random_state.seed_anew(rng_layout, ctx)

    _agree(restore, misfit, ctx)
    return counts


def _counts(about: dict[str, Any]) -> Counts:
    """Those in ``policy.json``; before there was one of updates, a state after unscheduled ones
    alone was stored without the optimizer's."""
    steps = int(about["num_steps"])
    return Counts(steps=steps, updates=int(about.get("num_updates", steps)))


def _state(chunks: Sequence[Any], optimizer: Any, counts: Counts, loading: bool) -> dict[str, Any]:
    """What is stored; before the first update the optimizer has no state worth it."""
    weights = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    state = dict(weights)
    if counts.updates:
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


def _read_alone(folder: Path, distributed: bool) -> tuple[dict[str, Any], set[str]]:
    """``policy.json`` and the keys of what is stored.

    Reads all that each rank reads by itself before Megatron's first collective: a rank that cannot
    is found here, where the others do not wait for it yet. Refuses the state of an optimizer that
    is not as ``distributed`` as the present one.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_FILE}: not a policy checkpoint, or its saving was cut off"
        )
    state: dict[str, Any] = json.loads(file.read_text())
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {state.get('format')!r}, this version reads {FORMAT}"
        )
    stored = state.get("distributed_optimizer", False)
    if _counts(state).updates and stored != distributed:
        raise CheckpointError(
            f"{folder} was saved with policy.distributed_optimizer={str(stored).lower()}, which "
            f"stores the optimizer in another way than {str(distributed).lower()}; set it to "
            f"{str(stored).lower()}"
        )
    dist_checkpointing.load_common_state_dict(str(folder))
    return state, set(serialization.load_sharded_metadata(str(folder)))


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
