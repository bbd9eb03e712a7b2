"""A plan as text for people, on one screen, and as plain values for programs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from megatron_spear.cluster.planner.engine_memory import EngineMemory
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.plan import Plan, make_plan
from megatron_spear.cluster.planner.search import Choice, why
from megatron_spear.cluster.planner.simulator import Simulated
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.sizes import active_parameters, model_parameters

BAR = 30
"""Characters of a whole bar."""


def plan_text(config: RunConfig) -> str:
    """The plan of a run as text, for those who only show it."""
    return text_of(make_plan(config))


def text_of(plan: Plan) -> str:
    """Lines of at most 110 characters or so; settings and reasons may be longer."""
    return "\n".join(line.rstrip() for line in _lines(plan)) + "\n"


def values_of(plan: Plan) -> dict[str, Any]:
    """The same as values of JSON: bytes and seconds as numbers."""
    job, own = plan.job, plan.own
    return {
        "model": plan.model,
        "parameters": model_parameters(job.shape).total,
        "chip": job.chip.name,
        "gpus": {"total": job.num_gpus, "train": job.trainer_gpus, "generate": job.engine_gpus},
        "fits": plan.fits,
        "refusals": list(plan.refusals),
        "warnings": list(plan.warnings),
        "layout": _layout_values(job),
        "memory": _memory_values(own) if own else None,
        "engine_memory": _engine_values(plan.engine) if plan.engine else None,
        "times": asdict(own.times) if own else None,
        "weight_update": asdict(plan.update) if plan.update else None,
        "better_layouts": [_choice_values(choice, job) for choice in plan.better],
        "num_layouts_that_fit": plan.num_fitting,
        "better_split": _choice_values(plan.split, job) if plan.split else None,
        "rollouts_ahead": asdict(plan.ahead) if plan.ahead else None,
        "sharded_weight_update": asdict(plan.sharded.times) if plan.sharded else None,
    }


def _lines(plan: Plan) -> Iterator[str]:
    yield _title(plan)
    for line in plan.refusals:
        yield f"DOES NOT FIT: {line}"
    if plan.own:
        yield ""
        yield from _memory_lines(plan.own)
        if plan.engine:
            yield from _engine_lines(plan.engine, plan.job)
        yield ""
        yield from _time_lines(plan, plan.own)
        if plan.ahead:
            yield _ahead_line(plan.ahead)
    yield ""
    yield from _better_lines(plan)
    for number, line in enumerate(plan.warnings):
        yield ("" if number else "\n") + f"note: {line}"


def _title(plan: Plan) -> str:
    job, size = plan.job, model_parameters(plan.job.shape).total
    active = active_parameters(job.shape)
    text = f"{plan.model}, {_count(size)} parameters"
    if active != size:
        text += f" ({_count(active)} active)"
    what = "CPU ranks" if job.is_cpu else job.chip.name
    text += f"; {job.num_gpus:,} x {what}"
    if not job.shares_gpus:
        text += f": {job.trainer_gpus:,} train, {job.engine_gpus:,} generate"
    return f"{text}\n{_cut(job)}"


def _cut(job: Job) -> str:
    """The layout in one line: ``TP 8 x PP 2 (4 pieces) x DP 48, 8,192 tokens a micro-batch``."""
    policy = job.policy
    parts = [f"TP {policy.tensor_parallel}"]
    if policy.context_parallel > 1:
        parts.append(f"CP {policy.context_parallel}")
    pieces = f" in {policy.virtual_pipeline} pieces" if policy.virtual_pipeline > 1 else ""
    parts += [f"PP {policy.pipeline_parallel}{pieces}", f"DP {job.data_parallel}"]
    text = " x ".join(parts)
    if policy.expert_parallel > 1:
        text += f", EP {policy.expert_parallel}"
    again = "" if policy.recompute == "none" else f", recompute {policy.recompute}"
    return f"{text}, {policy.tokens_per_microbatch:,} tokens a micro-batch{again}"


def _memory_lines(own: Choice) -> Iterator[str]:
    memory = own.memory
    of = f"stage {memory.stage + 1} of {own.job.policy.pipeline_parallel}"
    left = f"short by {_size(memory.short)}"
    if not memory.short:
        left = f"{_size(memory.limit - memory.total)} free"
    yield (
        f"Memory of the fullest rank ({of}, in {memory.moment}): {_size(memory.total)} of "
        f"{_size(memory.limit)}, {left}"
    )
    whole = max(memory.total, memory.limit)
    for name, size in memory.parts.items():
        yield _row(name, _size(size), _bar(size / whole))
    if memory.host:
        whose = "rank 0's, the engine included" if own.job.is_embedded else "a GPU"
        yield _row("on the host", _size(memory.host), whose)


def _engine_lines(engine: EngineMemory, job: Job) -> Iterator[str]:
    whole = job.chip.memory_bytes
    yield (
        f"Memory of a GPU that generates (TP {job.engine_tensor_parallel}, "
        f"{job.num_engines:,} servers): {_size(engine.share)} of {_size(whole)}"
    )
    yield _row("weights", _size(engine.weights), _bar(engine.weights / whole))
    holds = f"{engine.contexts:,} contexts of {engine.longest:,} tokens, {engine.wanted:,} asked"
    yield _row("KV cache", _size(engine.cache), f"{_bar(engine.cache / whole)} {holds}")


def _time_lines(plan: Plan, own: Choice) -> Iterator[str]:
    times, job, update = own.times, plan.job, plan.update
    assert update is not None, "made with the times"
    total = times.total_s
    yield (
        f"Step: {_seconds(total)}; binds: {times.binds}; trainer idle "
        f"{times.trainer_idle:.0%}, engines idle {times.engine_idle:.0%}"
    )
    notes = {
        "train": f"{times.mfu:.0%} of the peak" if not job.is_cpu else "",
        "replay": f"{job.replayed_trajectories} trajectories replayed, "
        f"{times.replay_s / total:.1%} of the step",
        "weight update": f"{_size(update.total_bytes)} sent, {_size(update.needed_bytes)} needed; "
        f"at the links' full rate {_seconds(update.floor_s)}",
    }
    phases = {
        "rollout": times.rollout_s,
        "old log-probs": times.old_logprobs_s,
        "train": times.train_s,
        "replay": times.replay_s,
        "weight update": times.weight_sync_s,
    }
    for name, seconds in phases.items():
        bar = _bar(seconds / max(sum(phases.values()), 1e-12))
        yield _row(name, _seconds(seconds), f"{bar} {notes.get(name, '')}")


def _ahead_line(ahead: Simulated) -> str:
    return (
        f"  simulated with lengths drawn: a step {_seconds(ahead.step_s)}; trainer idle "
        f"{ahead.trainer_idle:.0%}, engines idle {ahead.engine_idle:.0%}; a token is "
        f"{ahead.mean_lag:.2f} versions old, at most {ahead.max_lag}"
    )


def _better_lines(plan: Plan) -> Iterator[str]:
    own, job = plan.own, plan.job
    if not plan.better:
        if own and not own.memory.short:
            yield f"No better layout: of {plan.num_fitting} that fit none is 2 % faster"
        else:
            yield f"No layout of {job.trainer_gpus:,} {job.chip.name} fits"
    else:
        what = "Better layouts" if plan.fits else "The fastest layouts"
        yield f"{what} (of {plan.num_fitting} that fit):"
    for number, choice in enumerate(plan.better, 1):
        yield _choice_line(f"{number}.", choice, own, job)
    if plan.split:
        other = plan.split.job
        text = f"{other.trainer_gpus:,} train, {other.engine_gpus:,} generate:"
        yield _choice_line(text, plan.split, own, job, reason="")
    if plan.sharded and own:
        yield (
            f"  weight_sync.transport=sharded: {_seconds(plan.sharded.times.total_s)} "
            f"({_gain(plan.sharded, own)})"
        )


def _choice_line(
    head: str, choice: Choice, own: Choice | None, job: Job, reason: str | None = None
) -> str:
    settings = " ".join(f"{name}={_value(v)}" for name, v in choice.changes(job).items())
    gain = ""
    if own and not own.memory.short:
        gain = f" ({_gain(choice, own)})"
        reason = why(choice, own) if reason is None else reason
    because = f": {reason}" if reason else ""
    return (
        f"  {head} {_seconds(choice.times.total_s)}{gain}, {_size(choice.memory.total)}"
        f"{because}\n       {settings or 'the same layout'}"
    )


def _gain(choice: Choice, own: Choice) -> str:
    return f"{choice.times.total_s / own.times.total_s - 1:+.0%}"


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<26}{value:>10}  {note}"


def _bar(share: float) -> str:
    return "█" * max(round(BAR * share), 1 if share > 0 else 0)


def _size(num_bytes: float) -> str:
    """``46.4 GB``, ``812 MB``."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def _seconds(seconds: float) -> str:
    """``350 s``, ``12.3 s``, ``0.04 s``."""
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.{1 if seconds >= 1 else 2}f} s"


def _count(parameters: int) -> str:
    """``70.6 B``, ``1.3 M``."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _layout_values(job: Job) -> dict[str, Any]:
    names = (
        "tensor_parallel",
        "context_parallel",
        "pipeline_parallel",
        "virtual_pipeline",
        "expert_parallel",
        "recompute",
        "tokens_per_microbatch",
        "distributed_optimizer",
        "optimizer_offload",
    )
    return {name: getattr(job.policy, name) for name in names} | {
        "data_parallel": job.data_parallel
    }


def _memory_values(choice: Choice) -> dict[str, Any]:
    memory = choice.memory
    return {
        "parts": dict(memory.parts),
        "total": memory.total,
        "limit": memory.limit,
        "short": memory.short,
        "moment": memory.moment,
        "stage": memory.stage,
        "host": memory.host,
    }


def _engine_values(engine: EngineMemory) -> Mapping[str, int]:
    return {
        **asdict(engine),
        "cache": engine.cache,
        "tokens": engine.tokens,
        "contexts": engine.contexts,
    }


def _choice_values(choice: Choice, job: Job) -> dict[str, Any]:
    return {
        "settings": {f"policy.{name}": value for name, value in choice.changes(job).items()},
        "train": choice.job.trainer_gpus,
        "generate": choice.job.engine_gpus,
        "memory": choice.memory.total,
        "step_s": choice.times.total_s,
    }
