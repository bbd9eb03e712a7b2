"""A SPEAR step against a Dr.BoT step (``replay.enabled=false``); a part of ``method.py``.

The learning rate is next to 0, so that both play the same games with the same tokens at every step,
and what differs is replay.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.curriculum.coefficients import coefficients
from megatron_spear.types import StepContext

FILLING_STEPS = 2  # the store is empty at first, so these do not count
FIXED = ("policy.optimizer.lr=1e-12", "curriculum.replay_warmup_steps=0", "tracking.wandb=false")

Metrics = dict[str, float]


def rows(
    config: str, settings: Sequence[str], steps: int, threads: int, folder: Path
) -> list[tuple[str, str, str, str]]:
    """(what, SPEAR, Dr.BoT, added share) of ``steps`` pairs of steps."""
    run = load_config(config, [f"run.threads={threads}", *FIXED, *settings])
    return table(*measured(run, steps, folder))


def table(spear: Sequence[Metrics], plain: Sequence[Metrics]) -> list[tuple[str, str, str, str]]:
    """The rows of paired steps: medians, and the median of the pairs' differences as a share of the
    Dr.BoT step."""

    def seconds(
        what: str, name: str, aim: str = "", whole: str = "wall"
    ) -> tuple[str, str, str, str]:
        pairs = list(zip(spear, plain, strict=True))
        added = statistics.median((a[name] - b[name]) / b[whole] for a, b in pairs)
        ours, other = (statistics.median(s[name] for s in side) for side in (spear, plain))
        return what, f"{ours:.3f} s", f"{other:.3f} s", f"{added:+.1%} of the step{aim}"

    def work(what: str, name: str, aim: str = "") -> tuple[str, str, str, str]:
        return what, f"{statistics.fmean(step[name] for step in spear):.1%}", "0", aim

    replayed = statistics.fmean(step["replay/rows"] for step in spear)
    new = statistics.fmean(step["train/num_rows"] for step in plain)
    return [
        seconds(f"step: {new:.0f} new rows, {replayed:.0f} replayed", "wall", " (aim 10 %)"),
        seconds("the same, CPU time (on a shared machine)", "cpu", " (aim 10 %)", "cpu"),
        seconds("- rollout, of the same tokens", "time/rollout_s"),
        seconds("- optimizer steps", "time/train_s"),
        seconds("- log-probs of replayed rows", "time/current_logprobs_s"),
        seconds("- release of replayed rows", "time/replay_s"),
        seconds("all but rollout", "outside", " (aim 10 %)"),
        seconds("- without log-probs of replayed rows", "apart", " (aim 10 %)"),
        seconds("- and without training replayed rows", "beyond", " (aim 10 %)"),
        work("replay's share of the training FLOPs", "work/replay_train_fraction"),
        work("replay's FLOPs over the step's other", "work/replay_step_fraction", "paper 10-25 %"),
    ]


def measured(config: RunConfig, count: int, folder: Path) -> tuple[list[Metrics], list[Metrics]]:
    """The metrics of ``count`` SPEAR and as many Dr.BoT steps, in turns; ``wall`` is a step's s."""
    from megatron_spear.deadlines import StopFlag
    from megatron_spear.trainer import jobs

    model = jobs.warm_start(config, StopFlag())  # from the cache, if it is there
    from megatron_spear.policy import parallel
    from megatron_spear.trainer import build

    context = parallel.initialize(config.policy, seed=config.run.seed)
    found: list[list[Metrics]] = [[], []]
    with ExitStack() as closing:
        closing.callback(parallel.destroy)
        steps = []
        for name, enabled in (("spear", True), ("drbot", False)):
            section = config.replay.model_copy(update={"enabled": enabled})
            own = config.model_copy(update={"replay": section})
            stack = build.make_rollout(own, model)
            closing.callback(stack.close)
            policy = build.make_policy(own, model, context)
            steps.append(build.make_step(own, policy, stack, model, folder / name, own_hooks={}))
        for number in range(1, FILLING_STEPS + count + 1):
            ctx = StepContext(
                step=number,
                policy_version=number - 1,
                coefficients=coefficients(number, config.curriculum),
                seed=config.run.seed,
            )
            first = number % 2  # who goes second finds warmer caches
            pair = {side: timed(steps[side], ctx) for side in (first, 1 - first)}
            walls = f"SPEAR {pair[0]['wall']:.2f} s, Dr.BoT {pair[1]['wall']:.2f} s"
            print(f"step {number}: {walls}", file=sys.stderr, flush=True)
            if number > FILLING_STEPS:
                for side, metrics in pair.items():
                    found[side].append(metrics)
    return found[0], found[1]


def timed(step: Any, ctx: StepContext) -> Metrics:
    """A step's metrics, with its ``wall`` and ``cpu`` seconds; of these ``outside`` (without
    rollout), ``apart`` (also without log-probs of replayed rows) and ``beyond`` (also without
    replay's share of the optimizer steps, by FLOPs)."""
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = dict(step.run(ctx).metrics)
    metrics |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    metrics["outside"] = metrics["wall"] - metrics["time/rollout_s"]
    metrics["apart"] = metrics["outside"] - metrics["time/current_logprobs_s"]
    training = metrics["work/replay_train_fraction"] * metrics["time/train_s"]
    metrics["beyond"] = metrics["apart"] - training
    return metrics
