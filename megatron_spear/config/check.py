"""Combinations of settings that cannot work, found before anything is built."""

from collections.abc import Iterator, Sequence
from typing import Literal

from megatron_spear.config.check_environments import alfworld_games, program_deadlines
from megatron_spear.config.environments.base import WindowHistory
from megatron_spear.config.environments.math_code import (
    MathCodeSection,
)
from megatron_spear.config.layout import layout_problems
from megatron_spear.config.method import TaskSamplingSection
from megatron_spear.config.precision import (
    REFERENCE_PROBLEM,
    linear_sizes,
    precision_problems,
)
from megatron_spear.config.presets.layouts import PRESETS
from megatron_spear.config.schema import OptimizerSection, RunConfig

Use = Literal["train", "sft", "evaluate"]
"""What the settings are for."""


def check_config(config: RunConfig, world_size: int, use: Use = "train") -> list[str]:
    """One line for each combination that cannot work on ``world_size`` ranks; empty if none.

    Only what needs no model: a model given by ``model.path`` is checked where it is read. An
    evaluation has no policy, so nothing that speaks of training counts there.

    Example: with ``policy.tensor_parallel=2`` on 3 ranks, one line says that 3 is no multiple of 2.
    """
    checks = [_context(config), _servers(config)]
    if use != "evaluate":
        checks += [
            _layout(config, world_size),
            _precision(config),
            _preset(config),
            _tiny_model(config),
            _groups(config),
            _math_model(config),
            _reward(config),
            _replay(config),
            _tasks(config),
            _official(config),
            _optimizer("policy.optimizer", config.policy.optimizer, None),
            _optimizer("sft.optimizer", config.sft.optimizer, config.sft.steps),
            _length(config),
        ]
    if use == "train":
        checks += [alfworld_games(config), _hooks(config), _deadlines(config)]
    return [line for check in checks for line in check]


def _layout(config: RunConfig, world_size: int) -> Iterator[str]:
    """The layout, and how it cuts the made model; a loaded one has its own shape."""
    tiny, by_tensor, by_pipeline, num_experts = config.model.tiny, {}, {}, None
    if config.model.path is None:
        num_experts = 0
        by_tensor["model.tiny.num_kv_heads"] = tiny.num_kv_heads
        by_tensor["model.tiny.ffn_size"] = tiny.ffn_size
        by_pipeline["model.tiny.num_layers"] = tiny.num_layers
    yield from layout_problems(config.policy, world_size, by_tensor, by_pipeline, num_experts)


def _precision(config: RunConfig) -> Iterator[str]:
    """FP8, and whether the made model's sizes fit it."""
    policy, tiny, num_layers, linears = config.policy, config.model.tiny, None, None
    if config.model.path is None:
        num_layers = tiny.num_layers
        linears = linear_sizes(
            hidden=tiny.hidden_size,
            heads=tiny.num_heads,
            groups=tiny.num_kv_heads,
            head_dim=tiny.hidden_size // tiny.num_heads,
            ffn=tiny.ffn_size,
            experts=False,
            tensor_parallel=policy.tensor_parallel,
        )
    yield from precision_problems(policy, num_layers, linears)
    if policy.fp8.parameters and config.algorithm.kl.coef:
        yield REFERENCE_PROBLEM


def _preset(config: RunConfig) -> Iterator[str]:
    if config.preset is not None and config.model.path is None:
        hub_name = PRESETS[config.preset].published.hub_name
        yield (
            f"preset={config.preset} is a layout of {hub_name}, and model.path=null makes the tiny "
            "model; set model.path to a folder of that model, or preset=null"
        )


def _tiny_model(config: RunConfig) -> Iterator[str]:
    """Divisibility inside the made model."""
    if config.model.path is not None:
        return
    tiny = config.model.tiny
    for whole, part, whole_value, part_value in (
        ("model.tiny.hidden_size", "model.tiny.num_heads", tiny.hidden_size, tiny.num_heads),
        ("model.tiny.num_heads", "model.tiny.num_kv_heads", tiny.num_heads, tiny.num_kv_heads),
    ):
        if whole_value % part_value:
            yield f"{whole}={whole_value} is not a multiple of {part}={part_value}; change one"
    if tiny.hidden_size % tiny.num_heads == 0 and (tiny.hidden_size // tiny.num_heads) % 2:
        yield (
            f"model.tiny.hidden_size / model.tiny.num_heads = {tiny.hidden_size // tiny.num_heads} "
            "is odd; rotary embeddings need an even head size"
        )


def _math_model(config: RunConfig) -> Iterator[str]:
    """The made model reads generated problems alone."""
    env = config.env
    if not isinstance(env, MathCodeSection) or config.model.path is not None:
        return
    if env.prompt != "compact":
        yield (
            f"env.prompt={env.prompt} needs a model whose chat template lists tools, and "
            "model.path=null makes the tiny one; set model.path, or env.prompt=compact"
        )
    for name in ("problems", "eval_problems", "demonstrations"):
        if getattr(env, name) is not None:
            yield (
                f"env.{name} are for a model that reads English, and model.path=null makes the "
                f"tiny one, whose words are those of generated problems; set model.path, or "
                f"env.{name}=null"
            )


def _context(config: RunConfig) -> Iterator[str]:
    rollout = config.rollout
    if rollout.max_new_tokens >= rollout.max_context:
        yield (
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in "
            f"rollout.max_context={rollout.max_context}"
        )


def _groups(config: RunConfig) -> Iterator[str]:
    rollout, algorithm = config.rollout, config.algorithm
    if config.policy.tokens_per_microbatch < rollout.max_context:
        yield (
            f"policy.tokens_per_microbatch={config.policy.tokens_per_microbatch} is below "
            f"rollout.max_context={rollout.max_context}: the longest context fits no micro-batch"
        )
    if rollout.group_size < 2:
        yield "rollout.group_size=1 gives advantage 0 everywhere (reward minus itself); use >= 2"
    if algorithm.keep_groups_fraction == 0.0:
        yield "algorithm.keep_groups_fraction=0 keeps no group, so nothing is trained; use > 0"
    if algorithm.normalize_std and algorithm.advantage != "grpo":
        own = {
            "rloo": "rloo never divides",
            "reinforce_pp_baseline": "reinforce_pp_baseline whitens over the step's tokens",
            "gigpo": "gigpo has algorithm.gigpo.mode",
        }
        yield (
            "algorithm.normalize_std=true is read with algorithm.advantage=grpo only; "
            f"{own[algorithm.advantage]}"
        )
    correction = algorithm.off_policy_correction.mode
    if correction != "none" and algorithm.old_logprobs == "engine":
        yield (
            f"algorithm.off_policy_correction.mode={correction} compares the policy's log-probs "
            "with the engine's, and algorithm.old_logprobs=engine never computes the policy's; "
            "use old_logprobs=policy"
        )
    trajectories = rollout.prompts_per_step * rollout.group_size
    if algorithm.mini_batches > trajectories:
        yield (
            f"algorithm.mini_batches={algorithm.mini_batches} is above the {trajectories} "
            "trajectories of a step (rollout.prompts_per_step x rollout.group_size)"
        )


def _servers(config: RunConfig) -> Iterator[str]:
    """The engine, its servers, and how weights get there."""
    engine, servers = config.rollout.engine, config.rollout.servers
    transport, embedded = config.weight_sync.transport, config.rollout.engine == "embedded"
    started = config.cluster.servers.count
    if embedded and servers:
        yield (
            "rollout.engine=embedded has no servers, and rollout.servers names "
            f"{len(servers)}; set rollout.engine=sglang or vllm, or rollout.servers=[]"
        )
    if not embedded and not servers and not started:
        yield (
            f"rollout.engine={engine} needs rollout.servers, a list of URLs, or "
            "cluster.servers.count, which `megatron-spear launch` starts; to try it on this "
            "machine: megatron-spear serve MODEL --port 30000, then "
            "rollout.servers=[http://127.0.0.1:30000]"
        )
    if config.rollout.colocated and (embedded or config.rollout.max_lag):
        yield (
            "rollout.colocated=true is for servers that generate while nothing trains; use "
            "rollout.engine=sglang or vllm with rollout.max_lag=0"
        )
    for url in servers:
        if not url.startswith(("http://", "https://")):
            yield f"rollout.servers has {url!r}; expected a URL, http://host:port say"
    for url in sorted({url for url in servers if servers.count(url) > 1}):
        yield f"rollout.servers has {url} twice; name each server once"
    if transport != "auto" and embedded is (transport != "in_process"):
        yield (
            f"weight_sync.transport={transport} does not go with rollout.engine={engine}; use "
            f"{'auto or in_process' if embedded else 'auto, broadcast, sharded, disk or ipc'}"
        )
    if config.weight_sync.engine_expert_parallel > 1 and transport != "sharded":
        yield (
            f"weight_sync.engine_expert_parallel={config.weight_sync.engine_expert_parallel} is "
            f"read with weight_sync.transport=sharded only, and it is {transport}; change one"
        )
    if embedded and config.weight_sync.precision != "model":
        yield (
            f"weight_sync.precision={config.weight_sync.precision} is for servers that hold FP8 "
            "weights; the embedded engine computes in the model's own (weight_sync.precision=model)"
        )


def _deadlines(config: RunConfig) -> Iterator[str]:
    """The deadline of a single wait has to come before the watchdog, which ends the whole run."""
    rollout, limit_s = config.rollout, config.run.hang_limit_s
    deadlines = {
        "rollout.engine_deadline_s": rollout.engine_deadline_s,
        "rollout.env_deadline_s": rollout.env_deadline_s,
    }
    if rollout.engine != "embedded":
        deadlines["weight_sync.deadline_s"] = config.weight_sync.deadline_s
    yield from program_deadlines(config)
    for name, deadline_s in deadlines.items():
        if deadline_s >= limit_s:
            yield (
                f"{name}={deadline_s:g} is not below run.hang_limit_s={limit_s:g}, after which a "
                "wait ends the run; lower the first or raise the second"
            )


def _reward(config: RunConfig) -> Iterator[str]:
    reward = config.reward
    if reward.failure >= reward.success:
        yield (
            f"reward.failure={reward.failure:g} is not below reward.success={reward.success:g}, so "
            "winning would not pay; lower the first or raise the second"
        )


def _replay(config: RunConfig) -> Iterator[str]:
    replay = config.replay
    if not replay.enabled:
        return
    if config.algorithm.compat == "corrected":
        yield from _replay_age(config)
    continuous = replay.release == "continuous" and config.algorithm.compat == "corrected"
    if continuous and replay.rows_per_step > replay.capacity:
        yield (
            f"replay.rows_per_step={replay.rows_per_step} is above "
            f"replay.capacity={replay.capacity}: that many are never there"
        )
    if replay.reuse and not continuous:
        yield (
            "replay.reuse=true is for replay.release=continuous of the corrected method; a burst "
            "forgets what it leaves: set one of them otherwise"
        )
    if replay.decay != 1.0 and replay.baseline != "decay":
        yield (
            f"replay.decay={replay.decay:g} is read with replay.baseline=decay only, and it is "
            f"{replay.baseline}; change one"
        )
    if replay.gradient_norms and replay.combine != "joint":
        yield (
            "replay.gradient_norms=true is for replay.combine=joint; with separate_step every "
            "optimizer step already reports its own norm"
        )


def _replay_age(config: RunConfig) -> Iterator[str]:
    """A trajectory that was played with weights of ``max_lag`` versions ago is one version older at
    the first step that can replay it."""
    max_age, rollout = config.replay.max_age, config.rollout
    if max_age > rollout.max_lag:
        return
    if not max_age:
        what = "nothing is replayed: a trajectory is of age 1 in the step after its own"
    elif rollout.schedule == "deterministic":
        what = f"nothing is replayed: all are of age {rollout.max_lag + 1} before they can be"
    else:
        what = "trajectories that took the whole lag, the long ones, are too old before they can be"
    yield (
        f"replay.max_age={max_age} is not above rollout.max_lag={rollout.max_lag}, so {what}; use "
        f"at least {rollout.max_lag + 1}, or replay.enabled=false"
    )


def _tasks(config: RunConfig) -> Iterator[str]:
    """Drawing tasks by difficulty needs several, and room for the smallest share of each."""
    kinds = config.env.task_kinds
    if not config.curriculum.tasks.enabled:
        return
    if kinds is not None:
        yield from task_kind_problems(config.curriculum.tasks, kinds)
    if config.algorithm.dynamic_sampling_rounds:
        yield (
            "curriculum.tasks.enabled=true lets what was measured fade once a step, and "
            "algorithm.dynamic_sampling_rounds plays a step in several rounds, each of which it "
            "would take for a step; set one of them off"
        )


def task_kind_problems(tasks: TaskSamplingSection, kinds: Sequence[str]) -> Iterator[str]:
    """What keeps these kinds of tasks from being drawn by difficulty, if that is asked for."""
    count = len(kinds)
    if not tasks.enabled:
        return
    if count < 2:
        yield (
            "curriculum.tasks.enabled=true draws over kinds of tasks (env.task_types, "
            "env.categories), and there is one; name more, or set it to false"
        )
    elif tasks.min_share * count > 1.0:
        yield (
            f"curriculum.tasks.min_share={tasks.min_share:g} times {count} task types is above 1; "
            f"use at most {1 / count:.3g}"
        )


def _official(config: RunConfig) -> Iterator[str]:
    """What the official mode does not do, and would pass over in silence."""
    algorithm, replay = config.algorithm, config.replay
    if algorithm.compat != "official":
        return
    tree, history = algorithm.official.tree, config.env.history
    agent = tree == "agent"
    if (not isinstance(history, WindowHistory)) if agent else history != "full":
        rows, needed = ("a turn", "{window: 2}") if agent else ("a trajectory", "full")
        yield (
            f"algorithm.official.tree={tree} has rows of {rows}; "
            f"set env.history={needed} or the other tree"
        )
    if algorithm.aggregation == "group-mean-token-mean":
        yield (
            "algorithm.compat=official has no algorithm.aggregation=group-mean-token-mean; use "
            "another"
        )
    if algorithm.off_policy_correction.mode != "none":
        yield (
            "algorithm.compat=official corrects no mismatch; set "
            "algorithm.off_policy_correction.mode=none"
        )
    if not replay.enabled:
        return
    if replay.combine != "separate_step":
        yield (
            "algorithm.compat=official replays in optimizer steps of their own; set "
            "replay.combine=separate_step"
        )
    if replay.ratio_filter is not None:
        yield "algorithm.compat=official filters no ratios; set replay.ratio_filter=null"
    if replay.baseline not in ("p50", "decay"):
        yield (
            f"algorithm.compat=official has no replay.baseline={replay.baseline}; use p50 or decay"
        )
    if replay.require_tool_call:
        yield (
            "algorithm.compat=official asks for a tool call in its math tree, always, and never in "
            "its agent tree; set replay.require_tool_call=false"
        )
    if algorithm.official.tree == "math" and replay.loss != algorithm.loss:
        yield (
            "algorithm.official.tree=math: its replay reads algorithm.loss, whatever replay.loss "
            "says; give both the same values"
        )


def _optimizer(path: str, optimizer: OptimizerSection, steps: int | None) -> Iterator[str]:
    if optimizer.min_lr > optimizer.lr:
        yield f"{path}.min_lr={optimizer.min_lr:g} is above {path}.lr={optimizer.lr:g}"
    for name in ("beta1", "beta2"):
        if getattr(optimizer, name) == 1.0:
            yield f"{path}.{name}=1 never forgets and divides by zero in Adam; use < 1"
    if steps is not None and optimizer.warmup_steps > steps:
        yield f"{path}.warmup_steps={optimizer.warmup_steps} is above the {steps} steps there are"


def _length(config: RunConfig) -> Iterator[str]:
    run = config.run
    if run.stop_after is not None and run.stop_after > run.steps:
        yield f"run.stop_after={run.stop_after} is above run.steps={run.steps} and never happens"


def _hooks(config: RunConfig) -> Iterator[str]:
    names = [hook.name for hook in config.hooks]
    for name in sorted({name for name in names if names.count(name) > 1}):
        entries = ", ".join(f"hooks[{i}]" for i, own in enumerate(names) if own == name)
        yield f"hooks: {entries} have the same name {name!r}; give each another one"
