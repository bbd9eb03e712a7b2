"""What a run saves and takes back: one directory commit with all that a resumed run needs."""

import json
import logging
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from megatron_spear.background import in_background, nothing_to_do
from megatron_spear.config.fingerprint import config_hash
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import CheckpointError, ConfigError, SpearError
from megatron_spear.replay.state import require_keys
from megatron_spear.tracking.wandb_sink import read_run_id, write_run_id
from megatron_spear.trainer.commit import (
    POLICY_FOLDER,
    STATE_FILE,
    Checkpoint,
    CheckpointStore,
)
from megatron_spear.trainer.controller import Controller
from megatron_spear.trainer.evaluation import Won
from megatron_spear.trainer.loop import SpearStep
from megatron_spear.trainer.ranks import all_true, broadcast
from megatron_spear.trainer.run_directory import RunDirectory, versions
from megatron_spear.trainer.whole_sets import read_sets, write_sets
from megatron_spear.types import StepReport

log = logging.getLogger(__name__)

_KEYS = ("progress", "cursor", "hooks", "config_hash", "panel_sha256", "versions", "wandb_id")


@dataclass
class Progress:
    """What a run has come to.

    ``prompts`` is how many were consumed; ``wall_s`` the time since launch, over all launches,
    without what a kill threw away. The replay fractions are summed over the steps.
    """

    step: int = 0
    policy_version: int = 0
    prompts: int = 0
    won_before: Won = ()
    wall_s: float = 0.0
    rollout_s: float = 0.0
    rollout_tokens: float = 0.0
    train_s: float = 0.0
    train_tokens: float = 0.0
    replay_train_fractions: float = 0.0
    replay_step_fractions: float = 0.0

    def add(self, report: StepReport) -> None:
        """Count one finished step."""
        metrics = report.metrics
        self.step, self.policy_version = report.step, report.policy_version
        self.prompts += len(report.consumed)
        self.rollout_s += metrics["time/rollout_s"]
        self.rollout_tokens += metrics.get("rollout/action_tokens", 0.0)
        self.train_s += metrics["time/train_s"]
        self.train_tokens += metrics.get("train/tokens", 0.0)
        self.replay_train_fractions += metrics.get("work/replay_train_fraction", 0.0)
        self.replay_step_fractions += metrics.get("work/replay_step_fraction", 0.0)


class RunCheckpoints:
    """The checkpoints of a run; all but ``abandon`` is collective.

    ``panel_sha256`` is that of the evaluation panel (None on ranks other than the controller).
    """

    def __init__(
        self,
        config: RunConfig,
        step: SpearStep,
        directory: RunDirectory,
        panel_sha256: str | None,
    ) -> None:
        self._config, self._directory = config, directory
        self._policy, self._controller = step.policy, step.controller
        self._panel_sha256 = panel_sha256
        self._store = CheckpointStore(directory.checkpoints, config.checkpoint.keep)
        self._saving: Generator[Future[None]] | None = None
        self._waited_for: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Commit the policy, the progress and the controller's state as checkpoint ``step_N``.

        With ``checkpoint.async_save`` it is only begun: ``poll`` after each step commits it once
        its files are written. The one before is finished first.
        """
        self.finish()
        self._saving = self._save(progress)
        self._advance()

    def poll(self) -> None:
        """Go on with a save in the background as far as no disk has to be waited for.

        Raises CheckpointError on every rank if one of them could not write.
        """
        while self._waited_for is not None and all_true(self._waited_for.done()):
            self._advance()

    def finish(self) -> None:
        """Wait until a save in the background is committed; errors as in ``poll``."""
        while self._waited_for is not None:
            wait([self._waited_for])
            self._advance()

    def abandon(self) -> None:
        """Give up a save in the background, on this rank; harmless when there is none."""
        self._waited_for = None
        if self._saving is not None:
            self._saving.close()

    def _advance(self) -> None:
        assert self._saving is not None
        self._waited_for = None  # should the next line raise
        self._waited_for = next(self._saving, None)

    def _save(self, progress: Progress) -> Generator["Future[None]"]:
        """Saves; gives, on all ranks alike, what it has to wait for. Everything saved is of the
        moment of the first ``next``.

        No state of random generators of the control side: every draw is keyed by the seed and its
        place in the run, so a resumed run draws the same.
        """
        step, controller = progress.step, self._controller is not None
        with self._store.saving(step, controller=controller, agree=all_true) as folder:
            if self._config.checkpoint.async_save:
                yield from self._write_beside(folder, progress)
            else:
                self._policy.save(folder / POLICY_FOLDER)
                self._write_state(folder, progress)
        log.info("saved checkpoint of step %d", step)
        if self._controller:
            self._prune(self._controller)

    def _write_beside(self, folder: Path, progress: Progress) -> Generator["Future[None]"]:
        """The files of a checkpoint, written while the run goes on."""
        step = progress.step
        pending = self._policy.begin_save(folder / POLICY_FOLDER)
        try:
            failure: Exception | None = None
            try:
                self._write_state(folder, progress)
            except (SpearError, OSError, RuntimeError) as error:
                failure = error
            if not all_true(failure is None):
                raise failure or self._store.another_failed(step)
            yield pending.writing
            pending.finish()
            sealing = nothing_to_do()
            if self._controller:
                sealing = in_background(partial(self._store.seal, step), "manifest")
            yield sealing
            sealing.result()
        except BaseException:
            pending.abandon()
            raise

    def _write_state(self, folder: Path, progress: Progress) -> None:
        """The controller's part; nothing on other ranks."""
        if not self._controller:
            return
        state = {
            "progress": asdict(progress),
            "cursor": self._controller.cursor.state_dict(),
            "hooks": self._controller.hooks.state_dict(progress.step),
            "config_hash": config_hash(self._config),
            "panel_sha256": self._panel_sha256,
            "versions": versions(),
            "wandb_id": read_run_id(self._directory.path),
        }
        (folder / STATE_FILE).write_text(json.dumps(state))
        if self._controller.ahead is not None:
            write_sets(folder, self._controller.ahead.whole())

    def resume(self) -> Progress:
        """Take back the newest checkpoint that can be used; all at the start if there is none yet.

        One that is damaged, or needs a damaged file of a hook, is passed over with a warning and
        set aside; all ranks take the same. Raises CheckpointError when there are checkpoints and
        none of them can be used, ConfigError when they are of another run.
        """
        candidates: Iterator[Checkpoint] = iter(())
        if self._controller:
            self._store.sweep()
            candidates = self._store.whole()
        while (found := broadcast(next(candidates, None))) is not None:
            try:
                progress = self._restore(found.path)
            except CheckpointError as error:
                if self._controller:
                    log.warning("passing over checkpoint %s: %s", found.path, error)
            else:
                if self._controller:
                    self._store.set_aside_after(found.step)
                return progress
        if broadcast(bool(self._store.steps())):
            raise CheckpointError(
                f"resume={self._directory.path}: none of its checkpoints is whole (the warnings "
                "above say what is wrong with each); restore one from a copy, or start again with "
                "another run.dir"
            )
        return Progress()

    def _restore(self, folder: Path) -> Progress:
        """Collective: on every rank the progress, or what the controller or the policy found."""
        outcome: Progress | SpearError = Progress()
        if self._controller:
            try:
                outcome = self._restore_controller(self._controller, folder)
            except SpearError as error:
                outcome = error
            except OSError as error:
                outcome = CheckpointError(f"{error.filename} cannot be read ({error.strerror})")
        outcome = broadcast(outcome)
        if isinstance(outcome, SpearError):
            raise outcome
        self._policy.load(folder / POLICY_FOLDER)
        return outcome

    def _restore_controller(self, controller: Controller, folder: Path) -> Progress:
        state = json.loads((folder / STATE_FILE).read_text())
        require_keys(state, _KEYS, STATE_FILE)
        self._require_same_run(state, folder)
        controller.cursor.load_state_dict(state["cursor"])
        controller.hooks.load_state_dict(state["hooks"])
        if controller.ahead is not None:
            controller.ahead.take_back(read_sets(folder, controller.cursor.begun))
        if state["wandb_id"] and not read_run_id(self._directory.path):
            write_run_id(self._directory.path, state["wandb_id"])
        saved = state["progress"]
        require_keys(saved, [field.name for field in fields(Progress)], f"progress in {STATE_FILE}")
        return Progress(**{**saved, "won_before": tuple(saved["won_before"])})

    def _require_same_run(self, state: Mapping[str, Any], folder: Path) -> None:
        """ConfigError unless the state was saved with these settings and this panel."""
        if state["config_hash"] != config_hash(self._config):
            raise ConfigError(
                f"{folder} was written by a run with other settings than {self._directory.path}; "
                "put the run's own checkpoints there"
            )
        if state["panel_sha256"] != self._panel_sha256:
            raise ConfigError(
                f"resume={self._directory.path}: the games of the evaluation panel have changed: "
                f"their sha256 was {state['panel_sha256'][:16]}, is now "
                f"{str(self._panel_sha256)[:16]}, and a gain is measured on the same games; put "
                "the game files (env.games) back, or start again with another run.dir"
            )

    def _prune(self, controller: Controller) -> None:
        """Let the hooks free what only deleted checkpoints needed."""
        files = [
            self._directory.checkpoints / f"step_{s}" / STATE_FILE for s in self._store.steps()
        ]
        states = [json.loads(file.read_text())["hooks"] for file in files if file.is_file()]
        controller.hooks.prune(states)
