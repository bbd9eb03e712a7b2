"""A whole run: evaluate, train to the last step with checkpoints in between, evaluate, export,
sum up."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.hf_io import write_hf_folder
from megatron_spear.curriculum.coefficients import coefficients
from megatron_spear.deadlines import StopFlag
from megatron_spear.envs.family import Panel
from megatron_spear.errors import StopRequested
from megatron_spear.heartbeats.heart import beat, begin
from megatron_spear.tracking.bars import Bar, StepsBar
from megatron_spear.tracking.evaluations import EvaluationLog, share_won
from megatron_spear.tracking.progress import Console
from megatron_spear.tracking.sinks import Tracker
from megatron_spear.trainer.build import RolloutStack
from megatron_spear.trainer.consumption import ConsumptionLog
from megatron_spear.trainer.engine_probe import check_engine, max_logprob_gap
from megatron_spear.trainer.evaluation import PanelResult, evaluate, paired_interval
from megatron_spear.trainer.loop import SpearStep
from megatron_spear.trainer.ranks import all_true, broadcast
from megatron_spear.trainer.run_checkpoints import Progress, RunCheckpoints
from megatron_spear.trainer.run_directory import RunDirectory
from megatron_spear.types import StepContext, StepReport

log = logging.getLogger(__name__)


class SpearRun:
    """Runs on every rank; the controller alone evaluates, prints, tracks and owns the
    checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        step: SpearStep,
        *,
        directory: RunDirectory,
        rollout: RolloutStack | None,
        panel: Panel | None,
        console: Console,
        stop: StopFlag,
        model: Path,
    ) -> None:
        self._config, self._step, self._directory = config, step, directory
        self._rollout, self._panel = rollout, panel
        self.tracker: Tracker | None = None
        self.consumption: ConsumptionLog | None = None
        self.evaluations: EvaluationLog | None = None
        self._console, self._stop = console, stop
        self._model = model
        self._checkpoints = RunCheckpoints(
            config, step, directory, panel.sha256 if panel is not None else None
        )
        self._progress = Progress()
        self._steps: StepsBar | None = None
        self._saved = 0
        self._wall_s_before = 0.0
        self._is_controller = rollout is not None

    def resume(self) -> Progress:
        """Continue from the newest checkpoint that can be used; returns where it stands (step 0 if
        there is none).

        Raises CheckpointError when there are checkpoints and none of them can be used.
        """
        self._progress = self._checkpoints.resume()
        self._saved, self._wall_s_before = self._progress.step, self._progress.wall_s
        return self._progress

    def run(self) -> dict[str, Any]:
        """From where the run stands to its end; returns the summary (empty on other ranks)."""
        try:
            return self._run()
        finally:
            self._checkpoints.abandon()

    def _run(self) -> dict[str, Any]:
        section = self._config.run
        self._give_weights()
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

    def _give_weights(self) -> None:
        """The engine's first weights in this launch; servers are then asked what they make of
        them."""
        self._step.weight_sync.publish(self._progress.policy_version)
        servers = self._config.rollout.servers
        if not servers:
            return
        self._console.phase("Engine servers")
        stack = self._rollout
        gap = check_engine(
            self._step,
            (stack.loop, stack.engine) if stack is not None else None,
            num_probes=2 * len(servers),
            max_gap=max_logprob_gap(self._config),
        )
        self._console.line(
            f"{len(servers)} server(s) answer with the policy's weights: log-probs "
            f"differ by {gap:.2g} on average"
        )

    def _train(self, last: int) -> None:
        """Steps up to ``last``, with checkpoints; a clean stop saves before it ends."""
        if self._progress.step >= last:
            return
        self._console.phase(f"SPEAR steps {self._progress.step + 1} to {last}")
        stopping = False
        with self._console.steps(last, done=self._progress.step) as bar:
            self._steps = bar
            if self._progress.won_before:
                bar.evaluated(0, share_won(self._progress.won_before))
            while self._progress.step < last:
                self._evaluate_if_due()
                begin(f"step {self._progress.step + 1}")
                report = self._step.run(self._context(), self._check_stop)
                self._progress.add(report)
                self._track(report)
                self._checkpoints.poll()
                bar.finished(report.metrics, report.example)
                step, every = report.step, self._config.checkpoint.every
                # A signal may have come to some ranks alone; all of them save the same step.
                stopping = not all_true(not self._stop)
                if stopping or step == last or (every and step % every == 0):
                    self._save()
                if stopping:
                    break
        assert self._saved == self._progress.step, "the last step is always saved"
        self._finish_saving()
        if stopping:
            reason = self._stop.reason or "a signal to another rank"
            raise StopRequested(
                f"{reason}; saved at step {self._saved}, continue with "
                f"resume={self._directory.path}"
            )

    def _evaluate_if_due(self) -> None:
        """The evaluation after the last step. It belongs to the next one, after the checkpoint: if
        a stop or a kill comes before its end, the resumed run begins with it."""
        step, every = self._progress.step, self._config.evaluation.every
        if not every or not step or step % every:
            return
        try:
            self._evaluate(f"Evaluation at step {step}", step)
        except StopRequested:
            if self._saved != step:
                self._save()
            self._finish_saving()
            raise

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
        beat()
        self._console.beat(f"rollout: {finished} trajectories")

    def _track(self, report: StepReport) -> None:
        if self.consumption:
            self.consumption.log(report.step, report.consumed)
        if self.tracker:
            self.tracker.log(report.step, report.metrics)

    def _evaluate(self, title: str, step: int) -> PanelResult | None:
        """Play the panel with the engine's weights; None on ranks other than the controller.

        A clean stop ends it, on every rank, with StopRequested.
        """
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
        assert self._rollout and self._panel, "the controller has both"
        section = self._config.evaluation
        with self._console.bar("games", len(self._panel.prompts) * section.attempts) as bar:
            shown = advance(bar, self._stop)

            def progress(finished: int) -> None:
                beat()
                shown(finished)

            result = evaluate(
                self._rollout.rollouter,
                self._panel,
                section=section,
                progress=progress,
            )
        self._console.line(f"success {result.success:.3f} on {result.num_games} games")
        if self._steps is not None:
            self._steps.evaluated(step, result.success, result.wall_s)
        if result.failed:
            log.warning(
                "%d of the %d attempts failed; they count neither as won nor as lost",
                result.failed,
                len(result.won) * section.attempts,
            )
        if self.tracker:
            self.tracker.log(step, result.metrics())
        if self.evaluations:
            self.evaluations.log(step, self._panel.sha256, result.won)
        return result

    def _save(self) -> None:
        begin(f"checkpoint of step {self._progress.step}")
        self._progress.wall_s = self._wall_s()
        self._checkpoints.save(self._progress)
        self._saved = self._progress.step

    def _finish_saving(self) -> None:
        begin(f"the files of the checkpoint of step {self._saved}")
        self._checkpoints.finish()

    def _wall_s(self) -> float:
        """Seconds from launch to now, with those of the launches before."""
        return self._wall_s_before + float(self._console.elapsed_s)

    def _export(self) -> None:
        """The trained policy as a Hugging Face folder, ``model`` in the run directory."""
        self._console.phase("Export")
        weights = self._step.policy.export_weights()
        if not self._is_controller:
            for _ in weights:
                pass
            return
        target = self._directory.place_for_model()
        write_hf_folder(target, self._model, weights)
        self._console.line(f"Hugging Face folder: {target}")

    def _summary(self, after: PanelResult) -> dict[str, Any]:
        assert self._panel, "the controller has one"
        progress = self._progress
        mean, low, high = paired_interval(progress.won_before, after.won)
        return {
            "success_before": share_won(progress.won_before),
            "success_after": after.success,
            "success_gain": mean,
            "success_gain_95": [low, high],
            "success_by_task_type": after.by_kind(),
            "panel_games": len(after.won),
            "failed_before": progress.won_before.count(None),
            "failed_after": after.won.count(None),
            "panel_sha256": self._panel.sha256,
            "steps": progress.step,
            "wall_s": self._wall_s(),
            "rollout_tokens_per_s": progress.rollout_tokens / max(progress.rollout_s, 1e-9),
            "train_tokens_per_s": progress.train_tokens / max(progress.train_s, 1e-9),
            "replay_train_fraction": progress.replay_train_fractions / max(progress.step, 1),
            "replay_step_fraction": progress.replay_step_fractions / max(progress.step, 1),
        }


def advance(bar: Bar, stop: StopFlag) -> Callable[[int], None]:
    """A progress callback for one bar that ends an evaluation at a clean stop."""
    done = 0

    def report(finished: int) -> None:
        nonlocal done
        bar.advance(finished - done)
        done = finished
        if stop:
            raise StopRequested(f"{stop.reason} during an evaluation")

    return report
