"""The run directory: who may write into it, and where each file lies.

config.yaml     the resolved configuration        versions.json  packages and machine
metrics.jsonl   one line a record                 summary.json   the result
consumed.jsonl  one line a prompt consumed        evaluations.jsonl  each game of the panel
curves.png      the curves                        trajectories/  what was played, a file a step
checkpoints/    step_N, committed whole           model/         the policy, for Hugging Face
wandb/          wandb's own files
"""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megatron_spear.config.fingerprint import config_differences
from megatron_spear.config.load import CONFIG_NAME, dump_config, load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import ConfigError
from megatron_spear.files import write_whole
from megatron_spear.tracking.jsonl import METRICS_FILE
from megatron_spear.tracking.recorded_files import FOLDER, drop_steps_after

log = logging.getLogger(__name__)

_PACKAGES = (
    "megatron-spear",
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "wandb",
)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run. The controller makes it with ``create`` or ``resume``; other ranks with
    ``RunDirectory(path)``, which touches nothing."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.path / CONFIG_NAME

    @property
    def versions_file(self) -> Path:
        """Package versions, Python and the machine of the last launch."""
        return self.path / "versions.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / METRICS_FILE

    @property
    def consumed_file(self) -> Path:
        """Every prompt that was consumed, and what became of it (``consumption``)."""
        return self.path / "consumed.jsonl"

    @property
    def evaluations_file(self) -> Path:
        """Each game of the panel at every evaluation (``tracking.evaluations``)."""
        return self.path / "evaluations.jsonl"

    @property
    def summary_file(self) -> Path:
        """The result of a finished run."""
        return self.path / "summary.json"

    @property
    def curves_file(self) -> Path:
        """The curves of the run, a picture."""
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.path / "checkpoints"

    @property
    def trajectories(self) -> Path:
        """Folder of the recorded trajectories (``tracking.recorded``)."""
        return self.path / FOLDER

    @property
    def heartbeats(self) -> Path:
        """Where the ranks of a run without ``launch`` say what they do; there for several ranks."""
        return self.path / "heartbeats"

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "RunDirectory":
        """Start a new run in ``path``; writes ``config.yaml`` and ``versions.json``.

        Raises ConfigError when ``path`` holds anything of another run, or anything foreign. A
        directory left by the same configuration before its first record is taken again.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run.dir={path}: is a file, expected a directory; choose another")
        if path.is_dir() and any(path.iterdir()):
            run._refuse_reuse(config)
        path.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
        run._write(config)
        return run

    @classmethod
    def resume(cls, path: Path, config: RunConfig) -> "RunDirectory":
        """Continue the run in ``path``.

        Raises ConfigError when there is none, or when ``config`` would compute something else
        than the run does; settings of ``RESUME_MAY_DIFFER`` may change and are logged.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise ConfigError(
                f"resume={path}: holds no {CONFIG_NAME}, so it is no run directory; expected the "
                "run.dir of an earlier run"
            )
        before = load_config(run.config_file)
        differences = config_differences(before, config)
        if differences:
            raise ConfigError(
                f"resume={path}: the run was started with other settings:\n"
                + "\n".join(f"  {difference}" for difference in differences)
                + "\nwhat to do: leave these settings as they were, or start a new run with "
                "another run.dir and without resume"
            )
        for difference in config_differences(before, config, everything=True):
            log.info("resumed with another setting, %s", difference)
        run._warn_of_versions()
        run._write(config)
        return run

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """For the length of the block no other process may run here; ends with the process too.

        Raises ConfigError where one does. A file system without locks is taken as it is, and so is
        a path that is no directory (``resume`` tells what is wrong with it).
        """
        if not self.path.is_dir():
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(handle)
            yield
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path}: another process is running this run; wait for it, stop it, or "
                "choose another run.dir"
            ) from None
        except OSError as error:
            log.warning("%s: cannot be locked against a second process: %s", self.path, error)

    def place_for_model(self) -> Path:
        """``model``, not there yet. One that a finished run exported before is renamed to
        ``model.before-N``; what a kill left of an export goes."""
        target = self.path / "model"
        for unfinished in self.path.glob(".model.writing-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        if target.is_dir():
            if self.summary_file.is_file():
                number = next(n for n in itertools.count(1) if not self._before(n).exists())
                target.rename(self._before(number))
            else:  # of a launch that was killed between the export and its end
                shutil.rmtree(target)
        return target

    def _before(self, number: int) -> Path:
        return self.path / f"model.before-{number}"

    def drop_what_comes_after(self, step: int, num_steps: int) -> None:
        """Remove the recorded trajectories of steps after ``step``, which are to be played again,
        and the summary of a run that ended there and is now one of ``num_steps``; its model stays
        as ``model.before-N``.

        Where that fails it is told; they are written over when their time comes.
        """
        try:
            if step < num_steps and self.summary_file.is_file():
                self.place_for_model()
                self.summary_file.unlink()
            drop_steps_after(self.trajectories, step)
        except OSError as error:
            log.warning("what was recorded after step %d is still there: %s", step, error)

    def remove_unused(self) -> None:
        """Undo ``create`` if nothing was recorded since, so that a corrected launch may follow."""
        own = (
            self.config_file,
            self.versions_file,
            self.metrics_file,
            self.consumed_file,
            self.evaluations_file,
        )
        used = self.metrics_file.is_file() and self.metrics_file.stat().st_size
        if used or set(self.path.iterdir()) - {*own, self.checkpoints, self.heartbeats}:
            return
        shutil.rmtree(self.heartbeats, ignore_errors=True)
        with contextlib.suppress(OSError):  # a checkpoint inside keeps its folder
            self.checkpoints.rmdir()
            for file in own:
                file.unlink(missing_ok=True)
            self.path.rmdir()

    def _is_leftover(self, path: Path) -> bool:
        """Whether a kill in ``create`` left this behind."""
        empty = path == self.checkpoints and path.is_dir() and not any(path.iterdir())
        return empty or path.name == f"{CONFIG_NAME}.tmp"

    def _refuse_reuse(self, config: RunConfig) -> None:
        """Raise unless a non-empty directory was left by the same run before its first record."""
        choose = "choose another run.dir (or remove this directory)"
        if not self.config_file.is_file():
            foreign = sorted(p.name for p in self.path.iterdir() if not self._is_leftover(p))
            if not foreign:
                return
            names = ", ".join(foreign[:5])
            raise ConfigError(
                f"run.dir={self.path}: is not empty and no run directory (holds {names}); {choose}"
            )
        differences = config_differences(load_config(self.config_file), config)
        if differences:
            raise ConfigError(
                f"run.dir={self.path}: holds a run with other settings:\n"
                + "\n".join(f"  {difference}" for difference in differences)
                + f"\nwhat to do: {choose}, or set these back and continue with resume={self.path}"
            )
        if self.checkpoints.is_dir() and any(self.checkpoints.glob("step_*")):
            raise ConfigError(
                f"run.dir={self.path}: holds this run with checkpoints; continue it with "
                f"resume={self.path}, or {choose}"
            )
        if self.metrics_file.is_file() and self.metrics_file.stat().st_size:
            raise ConfigError(
                f"run.dir={self.path}: holds metrics of this run but no checkpoint to continue "
                f"from; {choose}"
            )

    def _write(self, config: RunConfig) -> None:
        write_whole(self.config_file, dump_config(config.model_copy(update={"resume": None})))
        write_whole(self.versions_file, json.dumps(versions(), indent=2) + "\n")

    def _warn_of_versions(self) -> None:
        """Log packages that changed since the run was started; a result may depend on them."""
        try:
            before = json.loads(self.versions_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        for name, version in versions().items():
            if name in _PACKAGES and before.get(name) != version:
                log.warning("%s was %s, is now %s", name, before.get(name), version)


def versions() -> dict[str, str | int | None]:
    """Versions of the packages that decide a result (None = not installed), Python, the machine."""
    found: dict[str, str | int | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["python"] = platform.python_version()
    found["platform"] = platform.platform()
    found["cpu"] = _cpu_model()
    found["cores"] = len(os.sched_getaffinity(0))
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
