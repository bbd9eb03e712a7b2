"""A whole run: evaluate, train to the last step with checkpoints in between, evaluate, export,
sum up."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spear.config.fingerprint import config_hash
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.hf_io import write_hf_folder
from megatron_spear.curriculum.coefficients import coefficients
from megatron_spear.deadlines import Watchdog
from megatron_spear.errors import CheckpointError, StopRequested
from megatron_spear.trainer.commit import Checkpoint, CheckpointStore
from megatron_spear.trainer.evaluation import PanelResult, evaluate, paired_interval
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.loop import SpearStep
from megatron_spear.trainer.ranks import all_true, broadcast
from megatron_spear.trainer.run_directory import RunDirectory
from megatron_spear.types import StepContext, StepReport
from megatron_spear.weight_sync.in_process import publish

log = logging.getLogger(__name__)

STATE_FILE = "trainer.json"
POLICY_FOLDER = "policy"


@dataclass
class Progress:
    """What a run has come to; saved with each checkpoint."""

    step: int = 0
    policy_version: int = 0
    won_before: tuple[bool, ...] = ()
    wall_s: float = 0.0
    rollout_s: float = 0.0
    rollout_tokens: float = 0.0
    train_s: float = 0.0
    train_tokens: float = 0.0

    def add(self, report: StepReport) -> None:
        """Count one finished step."""
        metrics = report.metrics
        self.step, self.policy_version = report.step, report.policy_version
        self.wall_s += metrics["time/step_s"]
        self.rollout_s += metrics["time/rollout_s"]
        self.rollout_tokens += metrics.get("rollout/action_tokens", 0.0)
        self.train_s += metrics["time/train_s"]
        self.train_tokens += metrics.get("train/tokens", 0.0)


class SpearRun:
    """Runs on every rank; the controller alone evaluates, prints, tracks and owns the
    checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        step: SpearStep,
        *,
        directory: RunDirectory,
        rollout: Any,
        panel: Any,
        console: Any,
        stop: Any,
        model: Path,
    ) -> None:
        self._config, self._step, self._directory = config, step, directory
        self._rollout, self._panel = rollout, panel
        self.tracker: Any = None
        self._console, self._stop = console, stop
        self._model = model
        self._store = CheckpointStore(directory.checkpoints, config.checkpoint.keep)
        self._progress = Progress()
        self._watchdog = Watchdog(config.run.hang_limit_s, "the start of the run")
        self._is_controller = rollout is not None

    def resume(self) -> int:
        """Continue from the newest whole checkpoint; returns its step (0 if there is none).

        Raises CheckpointError when there are checkpoints and every one of them is damaged.
        """
        found: Checkpoint | None = self._store.recover() if self._is_controller else None
        if self._is_controller and found is None and self._store.steps():
            raise CheckpointError(
                f"resume={self._directory.path}: none of its checkpoints is whole (the warnings "
                "above say what is wrong with each); restore one from a copy, or start again with "
                "another run.dir"
            )
        path = broadcast(found.path if found else None)
        if path is None:
            return 0
        state = json.loads((path / STATE_FILE).read_text())
        if state["config_hash"] != config_hash(self._config):
            raise CheckpointError(f"{path} was written by a run with other settings")
        self._progress = Progress(**{**state["progress"], "won_before": ()})
        self._progress.won_before = tuple(state["progress"]["won_before"])
        self._step.policy.load(path / POLICY_FOLDER)
        publish(self._step.policy, self._step.engine, self._progress.policy_version)
        controller = self._step.controller
        if controller:
            controller.cursor.load_state_dict(state["cursor"])
            for hook, saved in zip(controller.hooks, state["hooks"], strict=True):
                hook.load_state_dict(saved)
        return self._progress.step

    def run(self) -> dict[str, Any]:
        """From where the run stands to its end; returns the summary (empty on other ranks).

        A step or evaluation that stands still for ``run.hang_limit_s`` ends the process loudly.
        """
        with self._watchdog:
            return self._run()

    def _run(self) -> dict[str, Any]:
        section = self._config.run
        if self._progress.step == 0:
            before = self._evaluate("Evaluation before", 0)
            self._progress.won_before = before.won if before else ()
        self._train(min(section.steps, section.stop_after or section.steps))
        if self._progress.step < section.steps:
            self._console.line(
                f"stopped after step {self._progress.step} of {section.steps} as asked "
                f"(run.stop_after); continue with resume={self._directory.path}"
            )
            return {}
        after = self._evaluate("Evaluation after", self._progress.step)
        self._export()
        return self._summary(after) if after else {}

    def _train(self, last: int) -> None:
        """Steps up to ``last``, with checkpoints; a clean stop saves before it ends."""
        if self._progress.step >= last:
            return
        self._console.phase(f"SPEAR steps {self._progress.step + 1} to {last}")
        saved = self._progress.step
        with self._console.bar("step", last, done=self._progress.step) as bar:
            while self._progress.step < last:
                self._watchdog.beat(f"step {self._progress.step + 1}")
                report = self._step.run(self._context(), self._check_stop)
                self._progress.add(report)
                self._track(report)
                bar.advance(1, **_shown(report.metrics))
                step, every = report.step, self._config.checkpoint.every
                stopping = broadcast(bool(self._stop))
                if stopping or step == last or (every and step % every == 0):
                    self._save()
                    saved = step
                if stopping:
                    break
                every = self._config.evaluation.every
                if every and step % every == 0 and step < self._config.run.steps:
                    try:
                        self._evaluate(f"Evaluation at step {step}", step)
                    except StopRequested:
                        if saved != step:
                            self._save()
                        raise
        assert saved == self._progress.step, "the last step is always saved"
        if broadcast(bool(self._stop)):
            raise StopRequested(
                f"{self._stop.reason or 'signal'}; saved at step {saved}, continue with "
                f"resume={self._directory.path}"
            )

    def _context(self) -> StepContext:
        step = self._progress.step + 1
        return StepContext(
            step=step,
            policy_version=self._progress.policy_version,
            coefficients=coefficients(step, self._config.curriculum),
            seed=self._config.run.seed,
        )

    def _check_stop(self, finished: int) -> None:
        """A clean stop waits for the end of the step; here only screen and watchdog hear of it."""
        self._watchdog.beat(f"step {self._progress.step + 1}, {finished} trajectories are done")
        self._console.beat(f"rollout: {finished} trajectories")

    def _track(self, report: StepReport) -> None:
        if self.tracker:
            self.tracker.log(report.step, report.metrics)

    def _evaluate(self, title: str, step: int) -> PanelResult | None:
        """Play the panel with the engine's weights; None on ranks other than the controller.

        A clean stop ends it, on every rank, with StopRequested.
        """
        self._watchdog.beat(title)
        self._console.phase(title)
        result: PanelResult | None = None
        stopped = ""
        try:
            if self._is_controller:
                result = self._play_panel(step)
        except StopRequested as error:
            stopped = f"{error}; continue with resume={self._directory.path}"
        stopped = broadcast(stopped)
        if stopped:
            raise StopRequested(stopped)
        return result

    def _play_panel(self, step: int) -> PanelResult:
        section = self._config.evaluation
        with self._console.bar("games", len(self._panel.prompts)) as bar:
            shown = advance(bar, self._stop)

            def progress(finished: int) -> None:
                self._watchdog.beat(f"the evaluation, {finished} games are done")
                shown(finished)

            result = evaluate(
                self._rollout.rollouter,
                self._panel,
                seed=section.seed,
                temperature=section.temperature,
                progress=progress,
            )
        self._console.line(f"success {result.success:.3f} on {len(result.won)} games")
        if self.tracker:
            self.tracker.log(step, result.metrics())
        return result

    def _save(self) -> None:
        """One directory commit with all that a resumed run needs."""
        step, controller = self._progress.step, self._step.controller
        meta = {"policy_version": self._progress.policy_version}
        with self._store.saving(
            step, meta, controller=self._is_controller, agree=all_true
        ) as folder:
            self._step.policy.save(folder / POLICY_FOLDER)
            if controller:
                state = {
                    "progress": vars(self._progress),
                    "cursor": controller.cursor.state_dict(),
                    "hooks": [hook.state_dict() for hook in controller.hooks],
                    "config_hash": config_hash(self._config),
                }
                (folder / STATE_FILE).write_text(json.dumps(state))
        log.info("saved checkpoint of step %d", step)
        if controller:
            self._prune(controller.hooks)

    def _prune(self, hooks: Sequence[Hook]) -> None:
        """Let the hooks free what only deleted checkpoints needed."""
        files = [
            self._directory.checkpoints / f"step_{s}" / STATE_FILE for s in self._store.steps()
        ]
        states = [json.loads(file.read_text())["hooks"] for file in files if file.is_file()]
        for index, hook in enumerate(hooks):
            hook.prune([state[index] for state in states])

    def _export(self) -> None:
        """The trained policy as a Hugging Face folder, ``model`` in the run directory."""
        self._console.phase("Export")
        weights = self._step.policy.export_weights()
        if not self._is_controller:
            for _ in weights:
                pass
            return
        target = self._directory.path / "model"
        if target.is_dir():
            target.rename(target.with_name(f"model.before-{int(time.time())}"))
        write_hf_folder(target, self._model, weights)
        self._console.line(f"Hugging Face folder: {target}")

    def _summary(self, after: PanelResult) -> dict[str, Any]:
        progress = self._progress
        mean, low, high = paired_interval(progress.won_before, after.won)
        return {
            "success_before": sum(progress.won_before) / len(progress.won_before),
            "success_after": after.success,
            "success_gain": mean,
            "success_gain_95": [low, high],
            "success_by_task_type": {
                name.removeprefix("eval/success_"): value
                for name, value in after.metrics().items()
                if name.startswith("eval/success_")
            },
            "panel_games": len(after.won),
            "panel_sha256": self._panel.sha256,
            "steps": progress.step,
            "wall_s": progress.wall_s,
            "rollout_tokens_per_s": progress.rollout_tokens / max(progress.rollout_s, 1e-9),
            "train_tokens_per_s": progress.train_tokens / max(progress.train_s, 1e-9),
        }


def advance(bar: Any, stop: Any) -> Callable[[int], None]:
    """A progress callback for one bar that ends an evaluation at a clean stop."""
    done = 0

    def report(finished: int) -> None:
        nonlocal done
        bar.advance(finished - done)
        done = finished
        if stop:
            raise StopRequested(f"{stop.reason} during an evaluation")

    return report


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few numbers beside the progress bar."""
    names = {"success": "rollout/success", "replayed": "replay/rows", "entropy": "policy/entropy"}
    return {short: metrics[name] for short, name in names.items() if name in metrics}
