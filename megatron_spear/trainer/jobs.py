"""The commands' work: train, warm start, evaluate. Every rank runs the same function."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_spear.cluster.attempt import Attempt, newest_checkpoint
from megatron_spear.config.check import Use, check_config
from megatron_spear.config.losses import LossSection
from megatron_spear.config.schema import RunConfig
from megatron_spear.envs.family import Panel, family_of
from megatron_spear.errors import ConfigError, DataError, StopRequested
from megatron_spear.tracking.evaluations import EvaluationLog
from megatron_spear.tracking.plot import plot_curves
from megatron_spear.tracking.progress import Console
from megatron_spear.tracking.sinks import build_tracker
from megatron_spear.tracking.summary import summary_rows, write_summary
from megatron_spear.trainer.consumption import ConsumptionLog
from megatron_spear.trainer.evaluated_model import EvaluatedModel
from megatron_spear.trainer.evaluation_report import (
    RESULT_FILE,
    TRAJECTORIES_FILE,
    table_rows,
    write_report,
)
from megatron_spear.trainer.evaluation_stats import statistics
from megatron_spear.trainer.own_code import own_code
from megatron_spear.trainer.registered import find_servers
from megatron_spear.trainer.run_directory import RunDirectory
from megatron_spear.trainer.watch import COLLECTIVE_LIMIT_S, watched
from megatron_spear.types import TrajectoryGroup

log = logging.getLogger(__name__)


def train(config: RunConfig, stop: Any, attempt: Attempt | None = None) -> dict[str, Any]:
    """The main job: initial model, warm start, SPEAR steps, evaluation, export, summary.

    In an attempt of ``launch`` a clean stop is noted there and ends well, so that nobody takes it
    for a crash; settings and data that cannot work are noted too.
    """
    if attempt is None:
        return _train(config, stop, None)
    controller = int(os.environ.get("RANK", "0")) == 0
    try:
        return _train(config, stop, attempt)
    except StopRequested as stopped:
        if controller:
            attempt.mark_stopped(str(stopped), newest_checkpoint(config.run.dir))
        return {}
    except (ConfigError, DataError) as error:
        if controller:
            attempt.mark_hopeless(str(error))
        raise


def _train(config: RunConfig, stop: Any, attempt: Attempt | None) -> dict[str, Any]:
    console, controller = _start(config, "train")
    own_hooks = own_code(config) if controller else {}
    with (
        console,
        _run_directory(config, controller) as directory,
        _ranks(config, console, _heartbeats(directory, attempt)) as context,
    ):
        from megatron_spear.trainer import build
        from megatron_spear.trainer.run import SpearRun

        panel = build.make_panel(config) if controller else None  # bad games end the run here
        model = _warm_model(config, context, console, stop)
        if attempt is not None and controller:
            attempt.tell_model(model)
        config, list_urls = find_servers(config, attempt, controller, stop, console)
        console.phase("Policy and engine")
        rollout = build.make_rollout(config, model, list_urls, attempt) if controller else None
        tracker = consumption = evaluations = step = None
        try:
            policy = build.make_policy(config, model, context)
            step = build.make_step(config, policy, rollout, model, directory.path, own_hooks)
            console.line(method_text(config))
            run = SpearRun(
                config,
                step,
                directory=directory,
                rollout=rollout,
                panel=panel,
                console=console,
                stop=stop,
                model=model,
            )
            resumed = run.resume() if config.resume else None
            if resumed is not None:
                console.line(f"continuing after step {resumed.step} of {config.run.steps}")
            if controller:
                resumed_step = resumed.step if resumed is not None else None
                directory.drop_what_comes_after(resumed_step or 0, config.run.steps)
                consumption = run.consumption = ConsumptionLog(
                    directory.consumed_file,
                    resumed=(resumed.step, resumed.prompts) if resumed is not None else None,
                )
                evaluations = run.evaluations = EvaluationLog(
                    directory.evaluations_file, resumed_step=resumed_step
                )
                tracker = run.tracker = build_tracker(
                    config.tracking,
                    folder=directory.path,
                    name=config.run.name,
                    config=config.model_dump(mode="json"),
                    resumed_step=resumed_step,
                )
            summary = run.run()
            if controller and summary:
                _finish(config, directory, summary, console)
            return summary
        finally:
            if tracker is not None:
                tracker.close()
            for record in (consumption, evaluations):
                if record is not None:
                    record.close()
            if step is not None:
                step.weight_sync.close()
            if rollout is not None:
                rollout.close()


def method_text(config: RunConfig) -> str:
    """The losses with all their effective settings, in words.

    Example: ``new trajectories: gpg; replayed: clipped (clip_low 0.2, ...), in the same optimizer
    steps``.
    """
    text = f"new trajectories: {_loss_text(config.algorithm.loss)}"
    if not config.replay.enabled:
        return text
    steps = {
        "joint": "in the same optimizer steps",
        "separate_step": "in optimizer steps of their own",
    }
    replay = config.replay
    return f"{text}; replayed: {_loss_text(replay.loss)}, {steps[replay.combine]}"


def _loss_text(section: LossSection) -> str:
    values = section.model_dump(exclude={"type"})
    settings = ", ".join(f"{k} {v:g}" if v is not None else f"no {k}" for k, v in values.items())
    return f"{section.type} ({settings})" if settings else section.type


def warm_start(config: RunConfig, stop: Any) -> Path:
    """Make the warm start, or find it in the cache; returns its Hugging Face folder."""
    console, _ = _start(config, "sft")
    with console, _ranks(config, console, None) as context:
        folder = _warm_model(config, context, console, stop)
        console.line(f"warm start: {folder}")
        return folder


def evaluate_model(
    config: RunConfig, model: EvaluatedModel, stop: Any, out: Path | None = None
) -> dict[str, Any]:
    """Play the panel with a model and write what it came to into ``out`` (None = the model's own
    place); the content of ``evaluation.json``."""
    console, _ = _start(config, "evaluate")
    from megatron_spear.trainer import build
    from megatron_spear.trainer.models import check_model

    section = config.evaluation
    build.use_threads(config.run.threads)
    check_model(model.folder)
    panel = build.make_panel(config)
    with console, model.results_folder(out) as folder:
        started = time.perf_counter()
        groups = _play_panel(config, model.folder, panel, console, stop)
        result = {
            "model": str(model.folder),
            "panel": {"sha256": panel.sha256, "prompts": len(panel.prompts)},
            **statistics(groups, attempts=section.attempts, seed=section.seed),
            "wall_s": time.perf_counter() - started,
            "settings": config.model_dump(mode="json", include={"env", "rollout", "evaluation"}),
        }
        write_report(folder, result, groups)
        console.table(table_rows(result), title="Evaluation")
        console.line(f"results: {folder / RESULT_FILE}   attempts: {folder / TRAJECTORIES_FILE}")
    return result


def compare_logprobs(
    config: RunConfig, model: Path, stop: Any, *, num_drawn: int | None, top: int
) -> bool:
    """Compare the engine's log-probs with the policy's, both with a Hugging Face folder's weights.

    Prompts as in ``logprob_job.engine_samples``; the ``top`` worst tokens are shown. Gives whether
    the mean difference is one that the precision explains. Every rank runs it.
    """
    console, controller = _start(config, "train")
    with console, _ranks(config, console, None) as context:
        from megatron_spear.trainer import build, logprob_job
        from megatron_spear.trainer.engine_probe import max_logprob_gap
        from megatron_spear.trainer.logprob_gap import gap_text, token_gaps
        from megatron_spear.trainer.models import check_model
        from megatron_spear.trainer.ranks import broadcast
        from megatron_spear.trainer.replay_of_run import make_decoder

        check_model(model)
        console.phase(f"Engine: {config.rollout.engine}")
        samples = []
        if controller:
            samples = logprob_job.engine_samples(config, model, stop, console, num_drawn=num_drawn)
        console.phase("Policy")
        policy = build.make_policy(config, model, context)
        values = logprob_job.policy_logprobs(config, policy, samples)
        normal = True
        if controller:
            gaps, allowed = token_gaps(samples, values), max_logprob_gap(config)
            console.phase("Log-probs")
            for line in gap_text(gaps, samples, make_decoder(model), top, allowed):
                console.line(line)
            normal = gaps.mean <= allowed
        return bool(broadcast(normal))


def _play_panel(
    config: RunConfig, model: Path, panel: Panel, console: Console, stop: Any
) -> list[TrajectoryGroup]:
    """The panel's attempts with the weights of a Hugging Face folder."""
    from megatron_spear.trainer import build
    from megatron_spear.trainer.engines import serve_folder
    from megatron_spear.trainer.evaluation import play
    from megatron_spear.trainer.run import advance

    rollout, section = build.make_rollout(config, model), config.evaluation
    try:
        if rollout.made.updates is not None:
            serve_folder(rollout.made.updates, model)
        console.phase("Evaluation")
        with console.bar("games", len(panel.prompts) * section.attempts) as bar:
            return play(rollout.rollouter, panel, section=section, progress=advance(bar, stop))
    finally:
        rollout.close()


def require_possible(config: RunConfig, world_size: int, use: Use = "train") -> None:
    """ConfigError with every combination of settings that cannot work on ``world_size`` ranks."""
    problems = check_config(config, world_size, use)
    if problems:
        raise ConfigError("these settings cannot work:\n" + "\n".join(f"  {p}" for p in problems))


class LogFormat(logging.Formatter):
    """What the package says at INFO is a plain line, as the console's own; all else says its level,
    rank and logger."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(levelname)s rank {rank} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        return record.message if record.levelno == logging.INFO else super().formatMessage(record)


def _start(config: RunConfig, use: Use) -> tuple[Console, bool]:
    """Check the settings and set up logging; (console, is this rank the controller)."""
    rank = int(os.environ.get("RANK", "0"))
    require_possible(config, int(os.environ.get("WORLD_SIZE", "1")), use)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the console has bars of its own
    controller = rank == 0
    console = Console(enabled=controller, live=config.tracking.progress)
    handler = console.log_handler() if controller else logging.StreamHandler()
    handler.setFormatter(LogFormat(rank))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Every rank would say the same.
    logging.getLogger("megatron_spear").setLevel(logging.INFO if controller else logging.WARNING)
    return console, controller


@contextlib.contextmanager
def _run_directory(config: RunConfig, controller: bool) -> Iterator[RunDirectory]:
    """The run directory; a new one goes again if the run fails before it has recorded anything."""
    if not controller:
        yield RunDirectory(config.run.dir)
    elif config.resume is not None:
        with RunDirectory(config.resume).alone():
            yield RunDirectory.resume(config.resume, config)
    else:
        directory = RunDirectory.create(config.run.dir, config)
        with directory.alone():
            try:
                yield directory
            except StopRequested:
                raise
            except BaseException:
                directory.remove_unused()
                raise


@contextlib.contextmanager
def _ranks(config: RunConfig, console: Console, heartbeats: Path | None) -> Iterator[Any]:
    """torch, Megatron and the process groups, for the length of the block, under a watchdog.

    ``heartbeats`` is the folder in which ranks say what they do.
    """
    with watched(config.run.hang_limit_s, heartbeats), _process_groups(config, console) as context:
        yield context


def _heartbeats(directory: RunDirectory, attempt: Attempt | None) -> Path | None:
    """The attempt's folder; without one, a folder of the run if there are several ranks."""
    if attempt is not None:
        return attempt.heartbeats
    return directory.heartbeats if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


@contextlib.contextmanager
def _process_groups(config: RunConfig, console: Console) -> Iterator[Any]:
    console.phase("Starting torch and Megatron-Core")
    from megatron_spear.policy import cpu

    cpu.install()
    from megatron_spear.policy import parallel
    from megatron_spear.trainer.build import use_threads

    threads = use_threads(config.run.threads)
    context = parallel.initialize(config.policy, seed=config.run.seed, timeout_s=COLLECTIVE_LIMIT_S)
    console.line(
        f"{context.world_size} rank(s): tensor {context.tensor_size} x context "
        f"{context.context_size} x pipeline {context.pipeline_size} x data {context.data_size}, "
        f"{threads} thread(s) each"
    )
    try:
        yield context
    finally:
        parallel.destroy()


def _warm_model(config: RunConfig, context: Any, console: Console, stop: Any) -> Path:
    """The Hugging Face folder RL starts from."""
    from megatron_spear.trainer import sft
    from megatron_spear.trainer.build import make_renderer
    from megatron_spear.trainer.models import check_preset, initial_model
    from megatron_spear.trainer.ranks import broadcast

    if context.is_controller:
        console.phase("Initial model")
    family = family_of(config.env)
    folder = broadcast(initial_model(config.model, family) if context.is_controller else Path())
    check_preset(config.preset, folder)
    console.line(f"Hugging Face folder: {folder}")
    if not config.sft.enabled:
        return folder
    target = broadcast(sft.cached_folder(config, folder) if context.is_controller else Path())
    console.phase("Warm start")
    if broadcast(target.is_dir()):
        console.line(f"from the cache: {target}")
        return target
    renderer = make_renderer(folder) if context.is_controller else None
    with console.bar("sft step", config.sft.steps) as bar:
        sft.warm_start(config, folder, target, context, renderer, bar, stop)
    return target


def _finish(
    config: RunConfig,
    directory: RunDirectory,
    summary: dict[str, Any],
    console: Console,
) -> None:
    """summary.json, the curves and the table."""
    summary = {"name": config.run.name, "seed": config.run.seed, **summary}
    write_summary(directory.summary_file, summary)
    console.table(summary_rows(summary), title="Summary")
    if config.tracking.curves:
        _draw_curves(config, directory, console)
    console.line(f"metrics: {directory.metrics_file}")


def _draw_curves(config: RunConfig, directory: RunDirectory, console: Console) -> None:
    try:
        plot_curves(directory.metrics_file, directory.curves_file, title=config.run.name)
    except (OSError, ValueError, RuntimeError) as error:  # the run itself is done and saved
        log.warning("the curves could not be drawn: %s", error)
    console.line(f"curves: {directory.curves_file}")
