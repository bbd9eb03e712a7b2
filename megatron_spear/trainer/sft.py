"""The supervised warm start: the same policy code with a likelihood loss on demonstrations."""

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from megatron_spear.algorithms.policy_loss import NllLoss, finish_metrics
from megatron_spear.config.environments.custom import CustomSection
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.hf_io import write_hf_folder
from megatron_spear.data.packing import PackedStep
from megatron_spear.deadlines import StopFlag
from megatron_spear.envs.demonstration import Demonstration
from megatron_spear.envs.family import family_of
from megatron_spear.errors import StopRequested
from megatron_spear.heartbeats.heart import begin
from megatron_spear.policy.pack_for import pack_for
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.tracking.bars import Bar
from megatron_spear.trainer.demonstrations import DemonstrationSource, to_samples
from megatron_spear.trainer.gpu_memory import give_back
from megatron_spear.trainer.models import made_once
from megatron_spear.trainer.ranks import broadcast
from megatron_spear.trainer.seeds import warm_start_games
from megatron_spear.types import Origin
from megatron_spear.user_code import source_sha256

_FORMAT = 3  # raise it when demonstrations or rendering change, so that old caches are not used


def cached_folder(config: RunConfig, model: Path) -> Path:
    """Where the warm start of these settings lies (or will lie): a name from a hash of all that it
    is made from, the contents of the model, of loaded games and of a user's own file included."""
    family = family_of(config.env)
    env = {**config.env.model_dump(mode="json"), **family.contents()}
    if isinstance(config.env, CustomSection):
        env["code"] = source_sha256(type(family))
    made_from = {
        "format": _FORMAT,
        "model": _fingerprint(model),
        "env": env,
        "max_context": config.rollout.max_context,
        "sft": config.sft.model_dump(mode="json"),
        "precision": config.policy.precision,
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return config.model.cache_dir / f"warm-start-{digest[:16]}"


def warm_start(
    config: RunConfig,
    model: Path,
    target: Path,
    context: ParallelContext,
    renderer: ChatRenderer | None,
    bar: Bar,
    stop: StopFlag,
) -> None:
    """Train ``model`` on demonstrations and write the result to ``target``; collective.

    Raises StopRequested at a clean stop (nothing is kept of a partial one). Its policy's memory is
    free afterwards, for servers and the next policy.
    """
    section = config.sft
    policy = MegatronPolicy.from_hf(model, config.policy, section.optimizer, section.steps, context)
    source = None
    if context.is_controller:
        source = DemonstrationSource(
            config.env,
            section,
            warm_start_games(section.seed),
            limit_s=0.9 * config.run.hang_limit_s,  # before the watchdog, which knows less
        )
    try:
        batches = source.batches() if source else iter([None] * section.steps)
        for step, demonstrations in enumerate(batches):
            begin(f"warm-start step {step + 1}")
            packed = _pack(config, demonstrations, renderer, policy, step) if renderer else None
            metrics = policy.train_step(packed, NllLoss())
            losses = finish_metrics({k: v for k, v in metrics.items() if k.startswith("sft/")})
            bar.advance(1, loss=losses["sft/nll"])
            if broadcast(bool(stop)):
                raise StopRequested(
                    f"{stop.reason or 'signal'} in the warm start, of which nothing is kept; give "
                    "the same command again to make it from its beginning"
                )
    finally:
        if source:
            source.close()
    weights = policy.export_weights()
    if context.is_controller and not target.is_dir():
        with made_once(target) as work:
            write_hf_folder(work, model, weights)
    deque(weights, maxlen=0)  # what nobody wrote is still a collective
    del policy, weights
    give_back()  # no rank goes on before the folder is there


def _pack(
    config: RunConfig,
    demonstrations: Sequence[Demonstration] | None,
    renderer: ChatRenderer,
    policy: MegatronPolicy,
    step: int,
) -> PackedStep:
    """One batch; weights are divided by their sum, so the loss is a weighted mean over tokens."""
    view = family_of(config.env).view()
    rows = [
        row
        for index, played in enumerate(demonstrations or ())
        for row in to_samples(
            played,
            f"sft/{step}/{index}",
            renderer,
            view,
            history=config.env.history,
            observation_weight=config.sft.observation_weight,
            decision_weight=config.sft.decision_weight,
            max_tokens=config.rollout.max_context,
        )
    ]
    total = sum(float(weights.sum()) for _, weights in rows)
    return pack_for(
        policy,
        [sample for sample, _ in rows],
        [weights / total for _, weights in rows],
        [Origin.ON_POLICY] * len(rows),
        tokens_per_microbatch=config.policy.tokens_per_microbatch,
    )


def _fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of a Hugging Face folder's files."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
