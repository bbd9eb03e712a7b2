"""Checkpoints as atomic directory commits: a checkpoint is there whole, or not at all.

A checkpoint is written into ``step_N.tmp``; files are flushed to disk, then a manifest with the
size and sha256 of each, then the folder is renamed to ``step_N``. **The rename is the commit.**
Nothing points at "the latest": the newest folder whose manifest holds is the latest. What is
deleted is first renamed to ``step_N.trash``: a kill at any moment leaves the old or the new state.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.errors import CheckpointError
from megatron_spear.files import says_disk_full, sync_folder
from megatron_spear.trainer.manifest import MANIFEST, check_manifest, write_manifest

log = logging.getLogger(__name__)

STATE_FILE = "trainer.json"
"""In a run's checkpoint: the controller's state."""
POLICY_FOLDER = "policy"
"""In a run's checkpoint: the policy's, in Megatron's format."""

_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole checkpoint."""

    step: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run, the newest ``keep`` of them.

    One process (the controller) begins, commits, sweeps and sets aside; other ranks only write
    files into ``tmp_path(step)`` in between.

    Example: ``with store.saving(20) as folder: write(folder / "x")``.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        assert keep >= 1, "keep at least the newest checkpoint"
        self.folder = folder
        self.keep = keep

    def tmp_path(self, step: int) -> Path:
        """The folder files of this step are written into before the commit."""
        return self.folder / f"step_{step}.tmp"

    def begin(self, step: int) -> Path:
        """An empty folder to write the files of ``step`` into."""
        tmp = self.tmp_path(step)
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            tmp.mkdir(parents=True)
        except OSError as error:
            raise self._unwritten(step, error) from error
        return tmp

    def seal(self, step: int) -> None:
        """Write the manifest, the long part of ``commit``, ahead of it (in a thread, say).

        Raises CheckpointError when that cannot be.
        """
        try:
            write_manifest(self.tmp_path(step), step)
        except OSError as error:
            raise self._unwritten(step, error) from error

    def commit(self, step: int) -> Path:
        """Make ``step_N.tmp`` the checkpoint ``step_N``; returns its folder.

        On any failure the half-written folder is removed, earlier checkpoints stay as they are, and
        CheckpointError is raised when the disk is full.
        """
        tmp, final = self.tmp_path(step), self.folder / f"step_{step}"
        try:
            if not (tmp / MANIFEST).is_file():
                write_manifest(tmp, step)
            if final.exists():  # written before a fallback to an older step; now it comes again
                self._to_trash(final)
            tmp.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            unwritten = self._unwritten(step, error)
            self.abort(step)
            raise unwritten from error
        except BaseException:
            self.abort(step)
            raise
        self._prune(step)
        return final

    def abort(self, step: int) -> None:
        """Remove what was written of an uncommitted step."""
        shutil.rmtree(self.tmp_path(step), ignore_errors=True)

    @contextmanager
    def saving(
        self,
        step: int,
        *,
        controller: bool = True,
        agree: Callable[[bool], bool] = lambda ok: ok,
    ) -> Iterator[Path]:
        """Begin, let the body write files into the folder it is given, commit.

        With several ranks each calls this; ``agree(ok)`` must return, on all ranks, whether all of
        them are well (an all-reduce), so that one rank's full disk is everyone's CheckpointError
        and not a hang. The body's own collective calls must fail on all ranks or on none. Only the
        ``controller`` touches folders.
        """
        tmp = self.tmp_path(step)
        failure: CheckpointError | None = None
        try:
            if controller:
                self.begin(step)
        except CheckpointError as error:
            failure = error
        self._agreed(step, agree, failure, controller)
        try:
            yield tmp
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            if controller:
                self.abort(step)
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            failure = self._failure(step, error)
            agree(False)
            if controller:
                self.abort(step)
            if failure is None:
                raise
            raise failure from error
        self._agreed(step, agree, None, controller)
        try:
            if controller:
                self.commit(step)
        except CheckpointError as error:
            failure = error
        self._agreed(step, agree, failure, controller)

    def whole(self) -> Iterator[Checkpoint]:
        """The checkpoints whose files are all whole, newest first; each is verified when asked for.

        Reads only. A damaged one is passed over with a warning that says what is wrong with it.
        """
        for step, path in reversed(self._committed()):
            try:
                check_manifest(path, step)
            except CheckpointError as error:
                log.warning("passing over checkpoint %s: %s", path, error)
            else:
                yield Checkpoint(step=step, path=path)

    def sweep(self) -> None:
        """Remove the ``.tmp`` and ``.trash`` folders that a kill left behind."""
        for leftover in [*self.folder.glob("step_*.tmp"), *self.folder.glob("step_*.trash")]:
            log.info("removing %s, left by an interrupted save", leftover)
            shutil.rmtree(leftover, ignore_errors=True)

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than ``step`` to ``step_N.damaged``: they could not be used, and
        must not count among those kept."""
        for newer, path in self._committed():
            if newer > step:
                aside = path.with_name(path.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def steps(self) -> tuple[int, ...]:
        """Steps with a committed checkpoint, oldest first; their files are not verified."""
        return tuple(step for step, _ in self._committed())

    def _committed(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        found = ((_STEP.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())

    def _prune(self, newest: int) -> None:
        """Delete all but the newest ``keep``; a failure here costs disk space, never the run."""
        older = [path for step, path in self._committed() if step <= newest][: -self.keep]
        for path in older:
            try:
                self._to_trash(path)
            except OSError as error:
                log.warning("could not remove the old checkpoint %s: %s", path, error)

    def _to_trash(self, path: Path) -> None:
        trash = path.with_name(path.name + ".trash")
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _agreed(
        self,
        step: int,
        agree: Callable[[bool], bool],
        failure: CheckpointError | None,
        controller: bool,
    ) -> None:
        """Raise on every rank when one of them failed."""
        if agree(failure is None):
            return
        if controller:
            self.abort(step)
        raise failure or self.another_failed(step)

    def another_failed(self, step: int) -> CheckpointError:
        """What a rank says whose own part went well."""
        return CheckpointError(
            f"checkpoint of step {step} was not written: another rank could not write its part "
            "(its own message says why); earlier checkpoints are untouched"
        )

    def _failure(self, step: int, error: BaseException) -> CheckpointError | None:
        """What a failed write means for the user; None for a mistake in the program.

        torch does not always say that it met a full disk, so the free space counts too.
        """
        if isinstance(error, OSError) or self._is_full(error):
            return self._unwritten(step, error)
        return None

    def _unwritten(self, step: int, error: BaseException) -> CheckpointError:
        if not self._is_full(error):
            return CheckpointError(
                f"checkpoint of step {step} was not written: {_last_line(error)}; earlier "
                "checkpoints are untouched"
            )
        written, last = _size(self.tmp_path(step)), _size_of_last(self._committed())
        needed = f"about {_human(last)} (like the last one)" if last else "more"
        free, reason = _human(self._free()), _last_line(error)
        return CheckpointError(
            f"checkpoint of step {step} was not written: the disk is full or a quota is reached "
            f"({reason}). {_human(written)} were written, {needed} needed; {free} "
            f"are free in {self.folder}. Earlier checkpoints are untouched; free some space "
            "(or lower checkpoint.keep) and resume the run"
        )

    def _is_full(self, error: BaseException) -> bool:
        return says_disk_full(error) or self._free() < 1 << 20

    def _free(self) -> int:
        existing = next((p for p in (self.folder, *self.folder.parents) if p.exists()), Path("/"))
        return shutil.disk_usage(existing).free


def _last_line(error: BaseException) -> str:
    """The error in one line; torch puts the reason of a failed write below a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _size_of_last(committed: list[tuple[int, Path]]) -> int:
    return _size(committed[-1][1]) if committed else 0


def _size(folder: Path) -> int:
    """Bytes of all files in a folder; 0 when it is not there."""
    names = (Path(root) / name for root, _, files in os.walk(folder) for name in files)
    return sum(path.stat().st_size for path in names if path.exists())


def _human(size: int) -> str:
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
