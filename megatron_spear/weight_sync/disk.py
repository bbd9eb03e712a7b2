"""Weights as versioned Hugging Face folders on a file system that trainer and engines share.

FOLDER/7/   config.json, tokenizer, model*.safetensors: whole, or not there
FOLDER/8/   written while engines generate; they stand still only while they load it
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_spear.conversion import fp8_blocks
from megatron_spear.conversion.hf_io import write_hf_folder
from megatron_spear.errors import EngineError
from megatron_spear.weight_sync.manifest import Precision
from megatron_spear.weight_sync.update import Update


class Disk:
    """A ``Delivery`` through ``folder``, which belongs to the run alone.

    ``model`` is the Hugging Face folder that config and tokenizer are taken from. The newest
    ``keep`` versions stay until ``close``. Servers load a folder without opening an update. Raises
    CheckpointError if the disk is full.
    """

    def __init__(
        self, *, folder: Path, model: Path, precision: Precision = "model", keep: int = 2
    ) -> None:
        self._folder = Path(folder).resolve()
        self._model = Path(model)
        self._quantization = fp8_blocks.CONFIG if precision == "fp8" else None
        self._keep = keep

    def deliver(self, update: Update, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        """See ``Delivery``."""
        version = update.policy_version
        target = self._folder / str(version)
        written = 0

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal written
            for name, tensor in tensors:
                written += tensor.nbytes
                yield name, tensor

        try:
            self._remove(keep=self._keep - 1, below=version)
            write_hf_folder(
                target, self._model, counted(), quantization=self._quantization, flush=True
            )
            update.pause()
            update.each("loading", lambda server: server.load_folder(str(target), version))
        except BaseException as error:
            shutil.rmtree(target, ignore_errors=True)
            if isinstance(error, OSError):
                raise EngineError(f"weights cannot be written to {target}: {error}") from error
            raise
        return written

    def close(self) -> None:
        """Remove all versions: weights to keep are in checkpoints."""
        if self._folder.is_dir():
            self._remove(keep=0, below=0)

    def _remove(self, keep: int, below: int) -> None:
        """Leave the ``keep`` newest versions below this one, and nothing half-written or of a run
        that went further before it was resumed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        entries = [path for path in self._folder.iterdir() if path.is_dir()]
        versions = {int(path.name): path for path in entries if path.name.isdecimal()}
        older = sorted(number for number in versions if number < below)
        kept = {versions[number] for number in older[len(older) - min(keep, len(older)) :]}
        for path in entries:
            if path not in kept and (path in versions.values() or ".writing-" in path.name):
                shutil.rmtree(path, ignore_errors=True)
