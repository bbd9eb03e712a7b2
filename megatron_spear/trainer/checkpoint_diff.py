"""``inspect diff``: what its paths name, and the differences in words."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.cluster.attempt import newest_checkpoint
from megatron_spear.config.load import CONFIG_NAME
from megatron_spear.conversion.differences import OPTIMIZER, Differences, TensorChange
from megatron_spear.conversion.torch_dist import METADATA
from megatron_spear.errors import CheckpointError
from megatron_spear.trainer.commit import POLICY_FOLDER, STATE_FILE

_MAX_NAMES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedCheckpoint:
    """A folder that ``find_differences`` takes, and what it is in words."""

    folder: Path
    what: str


def find_checkpoint(path: Path) -> NamedCheckpoint:
    """A Hugging Face folder, a ``torch_dist`` folder, a run's checkpoint, or a run's newest one.

    Raises CheckpointError for anything else.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; expected a Hugging Face folder, a torch_dist checkpoint, a "
            "run's checkpoint or a run directory"
        )
    if (path / CONFIG_NAME).is_file():
        step = newest_checkpoint(path)
        if not step:
            raise CheckpointError(f"{path} has no checkpoint yet; name its model/ if it has one")
        path = path / "checkpoints" / f"step_{step}"
    if (path / POLICY_FOLDER / METADATA).is_file():
        return NamedCheckpoint(folder=path / POLICY_FOLDER, what=_of_run(path))
    if (path / METADATA).is_file():
        return NamedCheckpoint(folder=path, what=_of_run(path.parent))
    return NamedCheckpoint(folder=path, what="Hugging Face folder")


def diff_text(
    first: NamedCheckpoint, second: NamedCheckpoint, found: Differences, top: int
) -> list[str]:
    """The differences as lines: names of one side, sums, and the ``top`` most changed tensors of
    the weights and of the optimizer's state."""
    lines = [f"first   {first.folder} ({first.what})", f"second  {second.folder} ({second.what})"]
    for side, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            shown = ", ".join(names[:_MAX_NAMES])
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            lines.append(f"only in the {side}: {len(names)} tensors: {shown}{more}")
    lines += [f"not comparable: {misfit.name}: {misfit.why}" for misfit in found.misfits]
    lines += [f"padded otherwise, common rows compared: {name}" for name in found.padded]
    for optimizer, word in ((False, "weights"), (True, "optimizer state")):
        own = [c for c in found.changes if c.name.startswith(OPTIMIZER) == optimizer]
        if own:
            lines += ["", _total(word, own, found.relative(optimizer=optimizer))]
            lines += _table(own, top)
    lines += ["", "bitwise equal" if found.equal else "not bitwise equal"]
    return lines


def _total(word: str, changes: list[TensorChange], relative: float) -> str:
    equal = sum(change.bitwise for change in changes)
    values = sum(change.num_changed for change in changes)
    largest = max(change.max_abs for change in changes)
    return (
        f"{word}: {equal} of {len(changes)} tensors bitwise equal, {values:,} values changed, "
        f"relative change {relative:.3g}, largest {largest:.3g}"
    )


def _table(changes: list[TensorChange], top: int) -> list[str]:
    """The tensors by relative change, the largest (and what is not a number) first."""
    changed = [change for change in changes if not change.bitwise]
    ordered = sorted(changed, key=lambda c: (c.relative == c.relative, -c.relative, c.name))[:top]
    if not ordered:
        return []
    width = max(len(change.name) for change in ordered)
    lines = [f"{'tensor':{width}}  {'relative':>9} {'max':>9} {'mean':>9} {'changed':>8}  shape"]
    for c in ordered:
        share = c.num_changed / max(1, _size(c.shape))
        dtypes = "" if c.dtypes[0] == c.dtypes[1] else f", {c.dtypes[0]} and {c.dtypes[1]}"
        lines.append(
            f"{c.name:{width}}  {c.relative:>9.2e} {c.max_abs:>9.2e} {c.mean_abs:>9.2e} "
            f"{share:>8.1%}  {list(c.shape)}{dtypes}"
        )
    if len(changed) > len(ordered):
        lines.append(f"and {len(changed) - len(ordered)} more that changed")
    return lines


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _of_run(folder: Path) -> str:
    """Step and version of a run's checkpoint; just its kind where nothing says more."""
    try:
        progress = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["progress"]
        return f"step {progress['step']}, policy version {progress['policy_version']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "torch_dist"
