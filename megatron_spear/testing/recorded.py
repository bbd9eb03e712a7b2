"""Recorded trajectories: what an engine really sampled over several turns, ready to be packed."""

import asyncio
from pathlib import Path

import numpy as np

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.aggregation import WeightArray, token_weights
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.testing.hand_made import make_prompt, make_trajectory
from megatron_spear.testing.tiny import VOCAB
from megatron_spear.types import (
    Origin,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    TrainSample,
    TrajectoryId,
    Turn,
)


def recorded_samples(
    folder: Path, *, groups: int = 3, group_size: int = 4, turns: int = 3, temperature: float = 1.0
) -> tuple[list[TrainSample], list[WeightArray], list[Origin]]:
    """What ``pack`` takes, from trajectories the embedded engine samples with a folder's weights.

    Observations are random tokens of ``testing.tiny``'s vocabulary, rewards are drawn; everything
    else is as in training: masks, log-probs of the engine, advantages, loss weights. The last
    group counts as replayed. The same folder gives the same records.
    """
    engine = EmbeddedEngine.from_hf(
        folder, max_slots=groups * group_size, max_context=128, deadline_s=60.0
    )
    try:
        scored = [
            asyncio.run(_group(engine, str(group), group_size, turns, temperature))
            for group in range(groups)
        ]
    finally:
        asyncio.run(engine.close())
    section = AlgorithmSection(norm_length=16)
    samples = make_samples(scored, turn_advantages(scored, section, intrinsic_weight=1.0))
    weights = token_weights(samples, section.aggregation, section.norm_length)
    origins = [
        Origin.REPLAY if sample.trajectory_id.group == str(groups - 1) else Origin.ON_POLICY
        for sample in samples
    ]
    return samples, weights, origins


async def _group(
    engine: RolloutEngine, group: str, size: int, turns: int, temperature: float
) -> ScoredGroup:
    members = await asyncio.gather(
        *(_attempt(engine, group, member, turns, temperature) for member in range(size))
    )
    return ScoredGroup(group_id=group, prompt=make_prompt(group), members=tuple(members))


async def _attempt(
    engine: RolloutEngine, group: str, member: int, turns: int, temperature: float
) -> ScoredTrajectory:
    draw = np.random.default_rng([int(group), member])
    session = str(TrajectoryId(group=group, member=member))
    sampling = SamplingParams(temperature=temperature, max_new_tokens=6, stop_token_ids=(1, 2, 3))
    context = np.zeros(0, np.int32)
    record = []
    for turn in range(turns):
        observation = draw.integers(0, VOCAB, draw.integers(2, 15)).astype(np.int32)
        context = np.concatenate((context, observation))
        answer = await engine.generate(
            GenerationRequest(
                session=session,
                token_ids=context,
                sampling=sampling,
                seed=(int(group), member, turn),
            )
        )
        context = np.concatenate((context, answer.token_ids))
        record.append(
            Turn(
                observation_tokens=observation,
                action_tokens=answer.token_ids,
                action_logprobs=answer.logprobs,
                finish_reason=answer.finish_reason,
                versions=answer.versions,
                valid=bool(draw.random() < 0.7),
            )
        )
    engine.release(session)
    reward = Reward(outcome=float(member % 2), intrinsic=0.1 * draw.random(), format=-0.02)
    return ScoredTrajectory(trajectory=make_trajectory(group, member, (record,)), reward=reward)
