"""Training with real servers: their log-probs are the policy's after every weight update, by every
transport, and the gradient is the one that the embedded engine's log-probs give."""

import asyncio
import json
import urllib.request

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.config.rollout import RolloutSection, WeightSyncSection
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.policy import cpu, parallel
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.testing.real_engines import (
    requires_sglang,
    requires_vllm,
    sglang_server,
    vllm_server,
)
from megatron_spear.testing.tiny import tiny_hf_folder
from megatron_spear.trainer.engines import make_engine
from megatron_spear.trainer.transports import make_transport
from megatron_spear.types import Origin, TrajectoryId, VersionSpan

VOCAB = 212  # two ranks of vLLM share it
LOADER = ("--custom-weight-loader", "megatron_spear.weight_sync.receivers.sglang.load")
TOLERANCE = 1e-4
NUM, PROMPT_TOKENS, NEW_TOKENS = 6, 9, 20
LOSS = PolicyLoss.from_sections(AlgorithmSection(), ReplaySection().loss, temperature=1.0)


@pytest.fixture(scope="module")
def ctx():
    cpu.install()
    yield parallel.initialize(PolicySection(), seed=0, timeout_s=120)
    parallel.destroy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    # SGLang on a CPU pads each rank's part of the MLP to a multiple of 32.
    tiny_hf_folder(path, intermediate_size=128, vocab_size=VOCAB)
    return path


@pytest.fixture(scope="module")
def loop():
    with EventLoop("rollout") as running:
        yield running


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def sglang(request, folder):
    with sglang_server(folder, tensor_parallel=request.param, extra=LOADER) as server:
        yield server


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def vllm(request, folder):
    with vllm_server(folder, tensor_parallel=request.param) as server:
        yield server


@requires_sglang()
@pytest.mark.parametrize("transport", ["broadcast", "sharded", "disk", "ipc"])
def test_sglang(transport, sglang, folder, ctx, loop, tmp_path):
    _train_and_compare("sglang", sglang.url, transport, folder, ctx, loop, tmp_path)


@requires_vllm()
@pytest.mark.parametrize("transport", ["broadcast", "sharded", "disk"])
def test_vllm(transport, vllm, folder, ctx, loop, tmp_path):
    _train_and_compare("vllm", vllm.url, transport, folder, ctx, loop, tmp_path)


def _train_and_compare(kind, url, transport, folder, ctx, loop, tmp_path):
    rollout = RolloutSection(engine=kind, servers=(url,), engine_deadline_s=120)
    section = WeightSyncSection(transport=transport, deadline_s=120, bucket_bytes=100_000)
    policy, twin = (_policy(folder, ctx) for _ in range(2))
    made = make_engine(rollout, section, folder, loop)
    sync = make_transport(
        rollout, section, policy, (loop, made), virtual_pipeline=1, model=folder, folder=tmp_path
    )
    embedded = EmbeddedEngine.from_hf(folder, max_slots=NUM, max_context=128, deadline_s=60)
    stale = None
    try:
        for version in range(4):
            sync.publish(version)
            requests = [_request(version, number) for number in range(NUM)]
            answers = loop.run(_all(made.engine, requests))
            for answer in answers:
                assert answer.versions == (VersionSpan(version, NEW_TOKENS),)
            samples = [_sample(*item) for item in enumerate(zip(requests, answers, strict=True))]
            ours = policy.logprobs(_packed(samples), 1.0)
            _check_close(samples, ours, [s.rollout_logprobs for s in samples])
            if kind == "sglang":
                _check_close(samples, ours, [_score(url, s) for s in samples])
            if stale is not None:
                gaps = [np.abs(a - b).max() for a, b in zip(stale(samples), ours, strict=True)]
                assert max(gaps) > 100 * TOLERANCE, "the update is too small to be noticed"
            embedded.load_weights(policy.export_weights(), version)
            scored = loop.run(_scores(embedded, samples))
            _copy(policy, twin)
            before = {name: t.clone() for name, t in policy.export_weights()}
            stale = _scorer(before, folder, loop)
            gradients = [
                _gradient(policy, samples, [s.rollout_logprobs for s in samples]),
                _gradient(twin, samples, scored),
            ]
            scale = max(float(g.abs().max()) for g in gradients[0])
            assert scale > 1e-3
            for one, other in zip(*gradients, strict=True):
                assert float((one - other).abs().max()) < TOLERANCE * max(scale, 1.0)
    finally:
        sync.close()
        loop.run(made.engine.close())


def _policy(folder, ctx):
    optimizer = OptimizerSection(lr=0.02, clip_grad=0.0)
    return MegatronPolicy.from_hf(folder, PolicySection(), optimizer, 10, ctx)


def _copy(source, target):
    for one, other in zip(source._parameters(), target._parameters(), strict=True):
        other.data.copy_(one.data)


async def _all(engine, requests):
    return await asyncio.gather(*map(engine.generate, requests))


def _request(version, number):
    draw = np.random.default_rng([version, number])
    return GenerationRequest(
        session=f"{version}/{number}",
        token_ids=draw.integers(0, VOCAB, PROMPT_TOKENS).astype(np.int32),
        sampling=SamplingParams(temperature=1.0, max_new_tokens=NEW_TOKENS),
        seed=(version, number),
    )


def _sample(number, pair):
    request, answer = pair
    length = PROMPT_TOKENS + NEW_TOKENS
    mask = np.arange(length) >= PROMPT_TOKENS
    logprobs = np.zeros(length, np.float32)
    logprobs[PROMPT_TOKENS:] = answer.logprobs
    advantage = (-1.0) ** number * (1 + number)
    return make_sample(
        trajectory_id=TrajectoryId(group=str(number), member=0),
        token_ids=np.concatenate((request.token_ids, answer.token_ids)),
        response_mask=mask,
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        advantages=np.where(mask, np.float32(advantage), np.float32(0)),
    )


def _packed(samples, weight=0.0):
    weights = [np.where(s.response_mask, np.float32(weight), np.float32(0)) for s in samples]
    origins = [Origin.ON_POLICY] * len(samples)
    return pack(samples, weights, origins, data_parallel=1, tokens_per_microbatch=4096)


def _gradient(policy, samples, old_logprobs):
    """Of one optimizer step with these denominators of the ratio; the step is taken."""
    import dataclasses

    with_old = [
        dataclasses.replace(s, old_logprobs=np.where(s.response_mask, old, 0).astype(np.float32))
        for s, old in zip(samples, old_logprobs, strict=True)
    ]
    policy.train_step(_packed(with_old, 1 / (NUM * NEW_TOKENS)), LOSS)
    return [p.main_grad.clone() for p in policy._parameters()]


def _score(url, sample):
    """The server's own log-probs of these tokens, by its prompt scoring."""
    body = {
        "input_ids": sample.token_ids.tolist(),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    ask = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(ask, timeout=60) as reply:
        scored = json.loads(reply.read())["meta_info"]["input_token_logprobs"]
    return np.array([0.0, *(entry[0] for entry in scored[1:])], np.float32)


async def _scores(embedded, samples):
    """The embedded engine's log-probs of these tokens."""
    answers = await _all(
        embedded,
        [
            GenerationRequest(
                session=f"score/{number}",
                token_ids=sample.token_ids,
                sampling=SamplingParams(max_new_tokens=0),
                seed=0,
                score_prompt=True,
            )
            for number, sample in enumerate(samples)
        ],
    )
    for number in range(len(samples)):
        embedded.release(f"score/{number}")
    return [answer.prompt_logprobs for answer in answers]


def _scorer(weights, folder, loop):
    """Scores tokens by the weights of before an update."""
    engine = EmbeddedEngine.from_hf(folder, max_slots=NUM, max_context=128, deadline_s=60)
    engine.load_weights(weights.items(), 0)
    return lambda samples: loop.run(_scores(engine, samples))


def _check_close(samples, ours, theirs):
    for sample, mine, other in zip(samples, ours, theirs, strict=True):
        gap = np.abs(mine - other)[sample.response_mask].max()
        assert gap < TOLERANCE, f"log-probs differ by {gap}"


def test_the_settings_of_this_module_leave_a_real_gradient(folder, ctx):
    """Without servers: what is compared above is not zero and not the same for all log-probs."""
    policy, twin = (_policy(folder, ctx) for _ in range(2))
    draw = np.random.default_rng(0)
    samples = []
    for number in range(NUM):
        request = _request(0, number)
        answer_tokens = draw.integers(0, VOCAB, NEW_TOKENS).astype(np.int32)
        answer = type("A", (), {"token_ids": answer_tokens, "logprobs": np.full(NEW_TOKENS, -5.0)})
        samples.append(_sample(number, (request, answer)))
    true = policy.logprobs(_packed(samples), 1.0)
    one = _gradient(policy, samples, true)
    other = _gradient(twin, samples, [values + 0.01 for values in true])
    assert max(float(g.abs().max()) for g in one) > 1e-3
    gap = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    assert gap > TOLERANCE * max(1.0, max(float(g.abs().max()) for g in one)), gap
    assert torch.isfinite(one[0]).all()
