"""A pause in the middle of a generation: its tokens are reproducible from their weights."""

import asyncio

import numpy as np
import pytest
import torch
from embedded_cases import make_engine, reference, request, saved_model

from megatron_spear.errors import EngineError
from megatron_spear.types import VersionSpan

PROMPT = [4, 8, 15, 16]


def _weights(seed):
    return {
        name: t.detach().clone() for name, t in saved_model("qwen3", seed)[0].named_parameters()
    }


async def _update_in_the_middle(engine, mode, after_steps=10, weights=None):
    """One generation of 40 tokens with an update to the weights of seed 1 after some of them."""
    running = asyncio.create_task(engine.generate(request(PROMPT, new=40)))
    while engine.stats["decode_steps"] < after_steps:
        await asyncio.sleep(0)
    await engine.pause(mode)
    stats = dict(engine.stats)
    await asyncio.sleep(0.01)
    assert engine.stats == stats, "it went on while paused"
    engine.load_weights((weights or _weights(1)).items(), 7)
    await engine.resume()
    return await running


def test_retract_keeps_what_was_drawn_and_goes_on_with_the_new_weights():
    answer = asyncio.run(_update_in_the_middle(make_engine(max_context=64), "retract"))
    (old, before), (new, after) = answer.versions
    assert (old, new) == (0, 7) and before >= 10 and before + after == 40
    tokens = [*PROMPT, *answer.token_ids.tolist()]
    by_old = reference(saved_model("qwen3", 0)[0], tokens[: len(PROMPT)], answer)
    by_new = reference(saved_model("qwen3", 1)[0], tokens[: len(PROMPT)], answer)
    assert np.abs(answer.logprobs - by_old)[:before].max() < 1e-5
    assert np.abs(answer.logprobs - by_new)[before:].max() < 1e-5
    assert np.abs(answer.logprobs - by_new)[:before].max() > 1e-2


def test_abort_draws_all_of_it_from_the_new_weights():
    answer = asyncio.run(_update_in_the_middle(make_engine(max_context=64), "abort"))
    assert answer.versions == (VersionSpan(7, 40),)
    fresh = make_engine(max_context=64)
    fresh.load_weights(_weights(1).items(), 7)
    again = asyncio.run(fresh.generate(request(PROMPT, new=40)))
    assert answer.token_ids.tolist() == again.token_ids.tolist()


def test_an_update_that_fails_while_paused_fails_what_waits():
    async def spoilt():
        engine = make_engine(max_context=64)
        broken = _weights(1)
        del broken["model.norm.weight"]
        running = asyncio.create_task(engine.generate(request(PROMPT, new=40)))
        await asyncio.sleep(0)
        await engine.pause("retract")
        late = asyncio.create_task(engine.generate(request(PROMPT, "late")))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match=r"model\.norm\.weight"):
            engine.load_weights(broken.items(), 7)
        await engine.resume()
        for waited in (running, late):
            with pytest.raises(EngineError, match="not completed"):
                await waited

    asyncio.run(spoilt())


def test_a_pause_without_an_update_keeps_the_cache():
    async def paused():
        engine = make_engine(max_context=64)
        running = asyncio.create_task(engine.generate(request(PROMPT, new=40)))
        while engine.stats["decode_steps"] < 10:
            await asyncio.sleep(0)
        await engine.pause("retract")
        computed = engine.stats["prefill_tokens"]
        await engine.resume()
        return await running, engine.stats["prefill_tokens"] - computed

    answer, again = asyncio.run(paused())
    assert again == 1, "only the last token, whose logits are needed"
    whole = asyncio.run(make_engine(max_context=64).generate(request(PROMPT, new=40)))
    assert answer.token_ids.tolist() == whole.token_ids.tolist()
    assert torch.allclose(torch.tensor(answer.logprobs), torch.tensor(whole.logprobs), atol=1e-5)


def test_close_fails_what_waits_during_a_pause():
    async def closed():
        engine = make_engine()
        await engine.pause("retract")
        waiting = asyncio.create_task(engine.generate(request(PROMPT)))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await waiting

    asyncio.run(closed())
