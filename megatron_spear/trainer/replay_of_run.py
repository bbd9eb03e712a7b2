"""The replay store that a path names: a run's, as one of its checkpoints has it, or a folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spear.cluster.attempt import newest_checkpoint
from megatron_spear.config.load import CONFIG_NAME, load_config
from megatron_spear.envs.family import family_of
from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.replay.contents import PATTERN, ReplayContents, read_contents
from megatron_spear.trainer.commit import STATE_FILE

REPLAY = "replay"
_HOOKS = ("built_in.self_imitation", "built_in.official_replay")
_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundStore:
    """Contents of a store, and the checkpoint (None: there is none) that says which rows are live.

    ``policy_version`` and ``next_row`` are the checkpoint's.
    """

    contents: ReplayContents
    run: Path | None
    checkpoint: int | None
    policy_version: int | None
    next_row: int | None

    @property
    def num_newer(self) -> int:
        """Rows that were written after the checkpoint."""
        if self.next_row is None:
            return 0
        return int((self.contents.rows["row_ids"] >= self.next_row).sum())

    @property
    def version_now(self) -> int | None:
        """The newest policy version that is known; None for an empty store without checkpoint."""
        rows = self.contents.rows["policy_versions"]
        known = [self.policy_version] if self.policy_version is not None else []
        return max([*known, *rows.tolist()], default=None)


def read_store(path: Path, checkpoint: int | None = None) -> FoundStore:
    """The store of a run directory, of a checkpoint's folder, or in a replay folder.

    ``checkpoint`` chooses a step of the run (None: the newest). A run may go on meanwhile. Raises
    CheckpointError where there is no store, or no such checkpoint.
    """
    run, folder, checkpoint = _places(path, checkpoint)
    if run is None or checkpoint is not None:
        return _read(run, folder, checkpoint)
    for _ in range(_TRIES):
        step = newest_checkpoint(run)
        try:
            found = _read(run, folder, step or None)
        except CheckpointError:
            if newest_checkpoint(run) == step:
                raise
        else:
            if not found.contents.missing or newest_checkpoint(run) == step:
                return found
    raise CheckpointError(
        f"{path}: the run made new checkpoints, and deleted old files, {_TRIES} times while it was "
        "read; try again, or raise checkpoint.every"
    )


def make_decoder(model: Path) -> Callable[[list[int]], str]:
    """Token ids to text by a Hugging Face folder's tokenizer, special tokens included."""
    from transformers import AutoTokenizer

    if not (model / "tokenizer.json").is_file():
        raise CheckpointError(f"{model} has no tokenizer.json; give the model's folder")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=False))


def tokenizer_folder(run: Path | None) -> Path:
    """The Hugging Face folder with a run's tokenizer; ConfigError where none can be found."""
    if run is not None:
        from megatron_spear.trainer.models import tiny_model_folder  # brings torch

        config = load_config(run / CONFIG_NAME)
        own = [run / "model"]
        if config.model.path is not None:
            own.append(config.model.path)
        else:
            words = family_of(config.env).vocabulary()
            own.append(tiny_model_folder(config.model, words))
        for folder in own:
            if (folder / "tokenizer.json").is_file():
                return folder
    raise ConfigError(
        "no tokenizer was found for these rows; give the folder of the model that played them with "
        "--model"
    )


def _read(run: Path | None, folder: Path, step: int | None) -> FoundStore:
    state, version = _position(run, step) if run is not None and step else (None, None)
    contents = read_contents(folder, state)
    return FoundStore(
        contents=contents,
        run=run,
        checkpoint=step,
        policy_version=version,
        next_row=state["next_row"] if state is not None else None,
    )


def _places(path: Path, checkpoint: int | None) -> tuple[Path | None, Path, int | None]:
    """(run directory, replay folder, step) of a path."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; expected a run directory, a checkpoint or a replay folder"
        )
    if (path / STATE_FILE).is_file() and path.name.startswith("step_"):
        if checkpoint is not None:
            raise ConfigError(f"{path} is a checkpoint already; leave --checkpoint out")
        step = path.name.removeprefix("step_")
        if not step.isdigit():
            raise CheckpointError(f"{path} is no committed checkpoint; expected a folder step_N")
        run: Path | None = path.resolve().parents[1]
        assert run is not None
        folder, checkpoint = run / REPLAY, int(step)
    elif (path / CONFIG_NAME).is_file():
        run, folder = path, path / REPLAY
    else:
        beside = path.resolve().parent
        run, folder = beside if (beside / CONFIG_NAME).is_file() else None, path
    begun = run is not None and newest_checkpoint(run) > 0  # its store may be empty, without files
    if not begun and not any(folder.glob(PATTERN)):
        raise CheckpointError(
            f"{path}: no replay store here; expected a run directory (replay.enabled) that has "
            "made a step, one of its checkpoints, or a folder with segment-*.bin files"
        )
    if run is None and checkpoint is not None:
        raise ConfigError(f"{path} is of no run that is known, so it has no checkpoint to choose")
    return run, folder, checkpoint


def _position(run: Path, step: int) -> tuple[dict[str, Any], int]:
    """The store's state in a checkpoint, and the checkpoint's policy version."""
    file = run / "checkpoints" / f"step_{step}" / STATE_FILE
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        hooks, version = saved["hooks"], int(saved["progress"]["policy_version"])
        states = [hooks[name]["store"] for name in _HOOKS if name in hooks]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); name another step with --checkpoint, or the folder "
            f"of the segments alone: copy {run / REPLAY} elsewhere"
        ) from error
    if not states:
        raise CheckpointError(f"{file} holds no replay store: the run has replay.enabled=false")
    return states[0], version
