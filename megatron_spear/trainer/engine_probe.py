"""Whether the engines answer with the policy's weights, judged by log-probs and by nothing else.

A server's reply to an update says little: one that got unknown names, or kept a packed copy of its
old weights, answers that all is well.
"""

import asyncio
from collections.abc import Sequence

import numpy as np

from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import (
    Generation,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
)
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.trainer.loop import SpearStep
from megatron_spear.trainer.ranks import broadcast
from megatron_spear.types import Reward, TrainSample, TrajectoryId

_PROMPT_TOKENS, _NEW_TOKENS = 16, 16


def max_logprob_gap(config: RunConfig) -> float:
    """The mean difference (nats) that is allowed: the setting, or what the precision explains."""
    if config.weight_sync.max_logprob_gap is not None:
        return config.weight_sync.max_logprob_gap
    exact = config.policy.precision == "fp32" and config.weight_sync.precision == "model"
    return 1e-3 if exact else 0.3


def check_engine(
    step: SpearStep,
    engine: tuple[EventLoop, RolloutEngine] | None,
    *,
    num_probes: int,
    max_gap: float,
) -> float:
    """The mean absolute difference (nats) of the engine's log-probs and the policy's, collective.

    ``num_probes`` generations from prompts of drawn tokens run at once, so that each of as many
    idle servers has one. ``engine`` and its loop are None on ranks other than the controller.
    Raises EngineError on every rank if the difference is above ``max_gap`` or a probe failed.
    """
    samples: list[TrainSample] = []
    failure = ""
    if engine is not None:
        loop, server = engine
        try:
            vocab_size, temperature = step.policy.shape.vocab_size, step.loss.temperature
            samples = loop.run(draw_probes(server, num_probes, vocab_size, temperature))
        except EngineError as error:
            failure = f"the engine did not answer a probe: {error}"
    failure = broadcast(failure)
    if failure:
        raise EngineError(failure)
    logprobs = step.policy_logprobs(samples)
    gap = broadcast(_mean_gap(samples, logprobs))
    if gap > max_gap:
        raise EngineError(
            f"after the first weight update the engine's log-probs differ from the policy's by "
            f"{gap:.3g} nats on average, expected at most {max_gap:g} "
            "(weight_sync.max_logprob_gap): it does not hold these weights, or computes another "
            "model; compare its model folder, dtype and quantisation with the policy's"
        )
    return gap


async def draw_probes(
    engine: RolloutEngine, num_probes: int, vocab_size: int, temperature: float
) -> list[TrainSample]:
    """Generations from prompts of drawn tokens, all at once; raises EngineError as the engine."""
    requests = [_request(number, vocab_size, temperature) for number in range(num_probes)]
    answers = await asyncio.gather(*map(engine.generate, requests))
    for request in requests:
        engine.release(request.session)
    pairs = zip(requests, answers, strict=True)
    return [_sample(number, *pair) for number, pair in enumerate(pairs)]


def _request(number: int, vocab_size: int, temperature: float) -> GenerationRequest:
    draw = np.random.default_rng([2, number])
    return GenerationRequest(
        session=f"probe {number}",
        token_ids=draw.integers(0, vocab_size, _PROMPT_TOKENS).astype(np.int32),
        sampling=SamplingParams(
            temperature=temperature, max_new_tokens=_NEW_TOKENS, stop_token_ids=()
        ),
        seed=(2, number),
    )


def _sample(number: int, request: GenerationRequest, answer: Generation) -> TrainSample:
    prompt, drawn = request.token_ids, answer.token_ids
    zeros = np.zeros(len(prompt) + len(drawn), np.float32)
    logprobs = np.concatenate((zeros[: len(prompt)], answer.logprobs))
    return TrainSample(
        trajectory_id=TrajectoryId(group="probe", member=number),
        segment=0,
        num_segments=1,
        prompt_id="probe",
        token_ids=np.concatenate((prompt, drawn)),
        response_mask=np.arange(len(zeros)) >= len(prompt),
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        advantages=zeros,
        reward=Reward(outcome=0.0),
        turn_starts=np.array([len(prompt)], np.int32),
        anchors=("",),
        policy_version=answer.versions[0].policy_version,
    )


def _mean_gap(samples: Sequence[TrainSample], logprobs: Sequence[np.ndarray]) -> float:
    gaps = [
        np.abs(values - sample.rollout_logprobs)[sample.response_mask]
        for sample, values in zip(samples, logprobs, strict=True)
    ]
    return float(np.concatenate(gaps).mean()) if gaps else 0.0
