"""The embedded engine's calls beyond the protocol: prompt scores, keys, updates in pieces."""

import asyncio
import dataclasses

import numpy as np
import pytest
import torch
from embedded_cases import CONFIGS, make_engine, request, saved_model

from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.sampling import seed_key
from megatron_spear.types import VersionSpan

PROMPT = [4, 8, 15, 16, 23, 42]


def _weights(seed, kind="qwen3"):
    with HfReader(saved_model(kind, seed)[1]) as reader:
        return [(name, reader.get(name).clone()) for name in reader.names]


def _scores(ask):
    return dataclasses.replace(ask, score_prompt=True)


def _of_prompt(model, tokens):
    """Log-probs ``[P]`` by transformers' own forward, 0 first."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    picked = logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()
    return np.concatenate([[0.0], picked])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_scored_prompt_has_the_models_logprobs(kind):
    engine = make_engine(kind)
    asyncio.run(engine.generate(request(PROMPT)))
    answer = asyncio.run(engine.generate(_scores(request(PROMPT, temperature=0.5))))
    assert answer.prompt_logprobs.dtype == np.float32 and len(answer.token_ids) == 5
    assert np.abs(answer.prompt_logprobs - _of_prompt(saved_model(kind)[0], PROMPT)).max() < 1e-5
    assert asyncio.run(engine.generate(request(PROMPT))).prompt_logprobs is None


def test_a_prompt_may_be_scored_alone_and_up_to_the_whole_context():
    engine = make_engine()
    prompt = [1 + i % 50 for i in range(96)]
    answer = asyncio.run(engine.generate(_scores(request(prompt, new=0))))
    assert answer.finish_reason == "length" and answer.versions == (VersionSpan(0, 0),)
    assert np.abs(answer.prompt_logprobs - _of_prompt(saved_model()[0], prompt)).max() < 1e-5
    assert asyncio.run(engine.generate(_scores(request(prompt)))).finish_reason == "context"
    with pytest.raises(EngineError, match="97 tokens to score; max_context is 96"):
        asyncio.run(engine.generate(_scores(request([*prompt, 1]))))


def test_prompts_are_scored_beside_what_runs():
    async def crowd():
        engine = make_engine()
        asks = [request([i, 3, 7 + i], f"{i}", new=6, seed=(i,)) for i in range(8)]
        asks = [_scores(ask) if i % 2 else ask for i, ask in enumerate(asks)]
        return asks, await asyncio.gather(*map(engine.generate, asks))

    for ask, answer in zip(*asyncio.run(crowd()), strict=True):
        assert len(answer.token_ids) == 6
        if ask.score_prompt:
            expected = _of_prompt(saved_model()[0], ask.token_ids.tolist())
            assert np.abs(answer.prompt_logprobs - expected).max() < 1e-5


def test_a_prompt_that_waits_through_an_update_is_scored_by_the_new_weights():
    async def updated():
        engine = make_engine()
        await engine.pause("retract")
        waiting = asyncio.create_task(engine.generate(_scores(request(PROMPT))))
        await asyncio.sleep(0)
        engine.load_weights(_weights(1), 7)
        await engine.resume()
        return await waiting

    answer = asyncio.run(updated())
    expected = _of_prompt(saved_model("qwen3", 1)[0], PROMPT)
    assert np.abs(answer.prompt_logprobs - expected).max() < 1e-5


def test_a_key_draws_what_its_seed_draws():
    key = seed_key((3, 1, 4))
    assert 0 <= key < 1 << 64 and seed_key(key) == key
    drawn = [
        asyncio.run(make_engine().generate(request(PROMPT, new=20, seed=seed))).token_ids.tolist()
        for seed in ((3, 1, 4), key, key ^ 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for wrong in (-1, 1 << 64):
        with pytest.raises(EngineError, match="a key is 0 to"):
            asyncio.run(make_engine().generate(request(PROMPT, seed=wrong)))


def test_what_was_cached_and_retracted_is_told():
    async def paused():
        engine = make_engine()
        running = asyncio.create_task(engine.generate(request(PROMPT, new=40)))
        while engine.stats["decode_steps"] < 3:
            await asyncio.sleep(0)
        for _ in range(2):
            await engine.pause("retract")
            await engine.resume()
            while engine.is_still:
                await asyncio.sleep(0)
            for _ in range(3):
                await asyncio.sleep(0)
        first = await running
        return first, await engine.generate(request([*PROMPT, *first.token_ids, 5]))

    first, second = asyncio.run(paused())
    assert first.num_retractions == 2 and first.cached_tokens == 0
    assert second.num_retractions == 0 and second.cached_tokens == len(PROMPT) + 39


def test_an_aborted_generation_answers_with_what_it_has():
    async def aborted():
        engine = make_engine()
        asks = [request(PROMPT, f"{i}", new=80) for i in range(6)]
        tasks = [asyncio.create_task(engine.generate(ask)) for ask in asks]
        while engine.stats["decode_steps"] < 5:
            await asyncio.sleep(0)
        engine.abort("1")
        engine.abort("nobody")
        await engine.pause("retract")
        await asyncio.sleep(0.01)
        assert [task.done() for task in tasks] == [False, True, False, False, False, False]
        engine.abort()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(aborted())
    assert {answer.finish_reason for answer in answers} == {"abort"}
    assert [len(answer.token_ids) > 0 for answer in answers] == [True] * 4 + [False] * 2


def test_draining_ends_what_runs_and_holds_what_waits():
    async def drained():
        engine = make_engine(max_slots=2)
        tasks = [
            asyncio.create_task(engine.generate(request(PROMPT, f"{i}", new=10))) for i in range(3)
        ]
        while engine.stats["decode_steps"] < 2:
            await asyncio.sleep(0)
        await engine.drain()
        await asyncio.sleep(0.01)
        assert [task.done() for task in tasks] == [True, True, False] and engine.is_still
        engine.load_weights(_weights(1), 7)
        await engine.resume()
        return await asyncio.gather(*tasks)

    versions = [answer.versions for answer in asyncio.run(drained())]
    assert versions == [(VersionSpan(0, 10),)] * 2 + [(VersionSpan(7, 10),)]


def test_weights_come_in_pieces():
    engine, tensors = make_engine(), _weights(1)
    engine.begin_update(3)
    for name, tensor in tensors[:5]:
        engine.weights.put(name, tensor)
    with pytest.raises(EngineError, match=r"lack 19 of 24 parameters.*send the full set"):
        engine.end_update(3)
    with pytest.raises(EngineError, match="version 3 was not completed"):
        asyncio.run(engine.generate(request(PROMPT)))
    engine.begin_update(4)
    for name, tensor in tensors:
        engine.weights.put(name, tensor)
    engine.end_update(4)
    answer = asyncio.run(engine.generate(_scores(request(PROMPT))))
    expected = _of_prompt(saved_model("qwen3", 1)[0], PROMPT)
    assert np.abs(answer.prompt_logprobs - expected).max() < 1e-5
