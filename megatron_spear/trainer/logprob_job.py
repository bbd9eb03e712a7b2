"""What ``inspect logprobs`` compares: tokens that the engine drew, and what the policy says of
them."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.shape import load_config, model_shape
from megatron_spear.errors import EngineError
from megatron_spear.policy.pack_for import pack_for
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.tracking.progress import Console
from megatron_spear.trainer import build
from megatron_spear.trainer.engine_probe import draw_probes
from megatron_spear.trainer.engines import serve_folder
from megatron_spear.trainer.logprob_gap import samples_of
from megatron_spear.trainer.run import advance
from megatron_spear.types import Origin, TrainSample


def engine_samples(
    config: RunConfig, model: Path, stop: Any, console: Console, *, num_drawn: int | None
) -> list[TrainSample]:
    """Tokens drawn by the engine of the settings with a Hugging Face folder's weights, with its
    log-probs.

    The prompts of the panel are played once each; with ``num_drawn`` as many prompts of drawn
    tokens are answered instead. Servers are given the weights first. Raises EngineError where
    nothing was drawn.
    """
    rollout, temperature = build.make_rollout(config, model), config.rollout.temperature
    try:
        if rollout.made.updates is not None:
            serve_folder(rollout.made.updates, model)
        if num_drawn is not None:
            vocab_size = model_shape(load_config(model)).vocab_size
            probes = draw_probes(rollout.engine, num_drawn, vocab_size, temperature)
            return rollout.loop.run(probes)
        panel = build.make_panel(config)
        with console.bar("prompts", len(panel.prompts)) as bar:
            groups = rollout.rollouter.collect_sync(
                panel.prompts,
                group_size=1,
                seed=(config.evaluation.seed, 0),
                temperature=temperature,
                progress=advance(bar, stop),
            )
    finally:
        rollout.close()
    samples = samples_of([member for group in groups for member in group.members])
    if not samples:
        raise EngineError("the engine drew no token, so there is nothing to compare")
    return samples


def policy_logprobs(
    config: RunConfig, policy: MegatronPolicy, samples: list[TrainSample]
) -> list[np.ndarray]:
    """The policy's log-probs ``[L]`` of each sample, at the rollouts' temperature; collective.

    Ranks other than the controller pass no samples and get [].
    """
    packed = None
    if policy.ctx.is_controller:
        packed = pack_for(
            policy,
            samples,
            [np.zeros(len(sample.token_ids), np.float32) for sample in samples],
            [Origin.ON_POLICY] * len(samples),
            tokens_per_microbatch=config.policy.tokens_per_microbatch,
        )
    return policy.logprobs(packed, config.rollout.temperature) or []
