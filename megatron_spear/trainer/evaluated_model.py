"""The model that ``evaluate CHECKPOINT`` names, and where its results go."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.cluster.attempt import newest_checkpoint
from megatron_spear.config.load import CONFIG_NAME
from megatron_spear.errors import CheckpointError, ConfigError

_MEGATRON_FILE = ".metadata"
_POLICY_FOLDER = "policy"


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A Hugging Face folder, the settings of the run it is of (None: of no run that is known), and
    the folder its results go to by default."""

    folder: Path
    config: Path | None
    results: Path

    @contextmanager
    def results_folder(self, out: Path | None) -> Iterator[Path]:
        """``out``, or the default folder, or the next free one beside it (``-2``, ``-3``, ..),
        made; it goes again if nothing was written into it.

        Raises ConfigError where ``out`` holds anything.
        """
        folder = _next_free(self.results) if out is None else _made(out)
        try:
            yield folder
        finally:
            with suppress(OSError):  # results are kept
                folder.rmdir()


def find_model(path: Path) -> EvaluatedModel:
    """What a path names: a Hugging Face folder, or a run directory with its exported model.

    Whether the folder is a sound model is told when it is read. Raises CheckpointError for a path
    that is no folder, a Megatron checkpoint, and a run without an exported model.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; expected a Hugging Face folder or a run directory"
        )
    for folder, config in ((path, ""), (path / _POLICY_FOLDER, " --config HF_FOLDER")):
        if (folder / _MEGATRON_FILE).is_file():
            raise CheckpointError(
                f"{path} is a Megatron checkpoint; expected a Hugging Face folder: `megatron-spear "
                f"convert megatron-to-hf {folder} DST{config}` makes one"
            )
    config_file = path / CONFIG_NAME
    if not config_file.is_file():
        place = path.resolve()
        results = place.with_name(f"{place.name}-evaluation")
        return EvaluatedModel(folder=path, config=None, results=results)
    if not (path / "model").is_dir():
        raise CheckpointError(f"{path} has no exported model (model/) yet; {_advice(path)}")
    return EvaluatedModel(folder=path / "model", config=config_file, results=path / "evaluation")


def _advice(run: Path) -> str:
    """How to come to a model of an unfinished run."""
    step = newest_checkpoint(run)
    if not step:
        return "it has no checkpoint either, so start the run again"
    policy = run / "checkpoints" / f"step_{step}" / _POLICY_FOLDER
    return (
        f"finish the run with `megatron-spear train resume={run}`, or make a model of its last "
        f"checkpoint: `megatron-spear convert megatron-to-hf {policy} DST --config HF_FOLDER` (the "
        f"folder that the run began with), then `megatron-spear evaluate DST {run / CONFIG_NAME}`"
    )


def _made(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"--out {out}: is there already; expected a new or an empty folder, so that no result "
            "is overwritten: choose another"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def _next_free(first: Path) -> Path:
    """``first``, or with the smallest number behind it that is free; made, by this process."""
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("there is always a free number")
