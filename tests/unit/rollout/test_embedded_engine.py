"""What the embedded engine draws and records, against the Hugging Face model."""

import asyncio

import numpy as np
import pytest
import torch
from embedded_cases import CONFIGS, VOCAB, make_engine, reference, request, saved_model

from megatron_spear.rollout.engines.embedded import EmbeddedEngine


async def _play(engine, model, name, turns=3, temperature=0.8):
    """A conversation of random observations; the largest error of its log-probs."""
    rng = np.random.default_rng(sum(map(ord, name)))
    context, worst = list(rng.integers(0, VOCAB, rng.integers(4, 12))), 0.0
    for turn in range(turns):
        ask = request(context, name, new=3 + turn, temperature=temperature, seed=(7, turn))
        answer = await engine.generate(ask)
        worst = max(
            worst, np.abs(reference(model, context, answer, temperature) - answer.logprobs).max()
        )
        context += [*answer.token_ids.tolist(), *rng.integers(0, VOCAB, 1 + turn)]
    engine.release(name)
    return worst


@pytest.mark.parametrize("kind", CONFIGS)
def test_logprobs_equal_the_model_over_turns_and_evictions(kind):
    model, _ = saved_model(kind)
    engine = make_engine(kind)

    async def all_sessions():
        return await asyncio.gather(*(_play(engine, model, f"{i}") for i in range(10)))

    assert max(asyncio.run(all_sessions())) < 1e-5
    assert engine.stats["reused_tokens"] > 0, "no turn found its cache"


def test_bf16_stays_near_the_model_in_bf16():
    model, folder = saved_model("qwen3", 0, "bfloat16")
    engine = EmbeddedEngine.from_hf(folder, max_slots=4, max_context=96, deadline_s=20.0)
    assert asyncio.run(_play(engine, model, "a")) < 0.1


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_greedy_equals_generate(kind):
    model, _ = saved_model(kind)
    prompt = [5, 9, 2, 44, 17]
    expected = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :]
    answer = asyncio.run(make_engine(kind).generate(request(prompt, new=20, temperature=0.0)))
    assert answer.token_ids.tolist() == expected.tolist()
    assert np.abs(answer.logprobs - reference(model, prompt, answer)).max() < 1e-5
    assert answer.finish_reason == "length" and answer.versions[0].policy_version == 0


def test_what_is_drawn_does_not_depend_on_the_batch():
    prompts = [[1 + i, 2, 3 + i % 5, *range(i % 7)] for i in range(32)]
    asks = [request(p, f"{i}", new=8, seed=(3, i)) for i, p in enumerate(prompts)]

    async def together():
        return await asyncio.gather(*(engine.generate(ask) for ask in reversed(asks)))

    engine = make_engine(max_slots=32)
    batch = asyncio.run(together())[::-1]
    for i in (0, 13, 31):
        alone = asyncio.run(make_engine().generate(asks[i]))
        assert batch[i].token_ids.tolist() == alone.token_ids.tolist()
        assert np.abs(batch[i].logprobs - alone.logprobs).max() < 1e-5
    other = asyncio.run(make_engine().generate(request(prompts[0], new=8, seed=(4, 0))))
    assert other.token_ids.tolist() != batch[0].token_ids.tolist()


def test_a_group_is_prefilled_once_and_copied():
    model, _ = saved_model()
    engine, prompt = make_engine(max_slots=8), list(range(20))

    async def group():
        asks = [request(prompt, f"g/{i}", new=3, seed=(i,)) for i in range(8)]
        return await asyncio.gather(*(engine.generate(ask) for ask in asks))

    answers = asyncio.run(group())
    assert engine.stats["prefill_tokens"] == 20
    assert engine.stats["shared_tokens"] == 7 * 20
    assert engine.stats["reused_tokens"] == 0
    assert engine.stats["prefill_calls"] == 1
    assert engine.stats["sampled_tokens"] == 24
    for answer in answers:
        assert np.abs(answer.logprobs - reference(model, prompt, answer)).max() < 1e-5
    assert len({tuple(a.token_ids) for a in answers}) > 1


def test_a_prefix_held_by_another_session_is_copied():
    model, _ = saved_model()
    engine = make_engine()
    asyncio.run(engine.generate(request([*range(10), 50], "a")))
    prompt = [*range(10), 51, 52]
    answer = asyncio.run(engine.generate(request(prompt, "b")))
    assert engine.stats["shared_tokens"] == 10
    assert engine.stats["prefill_tokens"] == 11 + 2
    assert np.abs(answer.logprobs - reference(model, prompt, answer)).max() < 1e-5


def test_a_session_prefills_only_what_is_new_and_survives_a_changed_past():
    model, _ = saved_model()
    engine, prompt = make_engine(), list(range(10))
    first = asyncio.run(engine.generate(request(prompt, new=4)))
    prompt += [*first.token_ids.tolist(), 60, 59]
    asyncio.run(engine.generate(request(prompt, new=1)))
    # 10 + 3 are cached (the last drawn token never ran), the fourth and the observation are new.
    assert engine.stats["reused_tokens"] == 13
    assert engine.stats["prefill_tokens"] == 10 + 3
    prompt[12] = (prompt[12] + 1) % VOCAB
    changed = asyncio.run(engine.generate(request(prompt, new=4)))
    assert engine.stats["reused_tokens"] == 13 + 12
    assert np.abs(changed.logprobs - reference(model, prompt, changed)).max() < 1e-5


def test_the_same_prompt_again_computes_its_last_token_only():
    engine = make_engine()
    first = asyncio.run(engine.generate(request([1, 2, 3, 4])))
    again = asyncio.run(engine.generate(request([1, 2, 3, 4])))
    assert again.token_ids.tolist() == first.token_ids.tolist()
    assert engine.stats["prefill_tokens"] == 4 + 1


def test_more_requests_than_slots_and_idle_sessions_all_finish():
    engine = make_engine(max_slots=3)

    async def crowd():
        asks = [request([i, i + 1], f"{i}", new=2 + i % 3) for i in range(20)]
        return await asyncio.gather(*(engine.generate(ask) for ask in asks))

    assert [len(a.token_ids) for a in asyncio.run(crowd())] == [2 + i % 3 for i in range(20)]
    # Nobody released: the three slots belong to sessions that idle, and a new one takes over.
    assert len(asyncio.run(engine.generate(request([9], "new"))).token_ids) == 5


def test_finish_reasons():
    engine = make_engine(max_context=12)
    prompt = [3, 1, 4]
    free = asyncio.run(engine.generate(request(prompt, new=6)))
    stop = int(free.token_ids[2])
    stopped = asyncio.run(engine.generate(request(prompt, new=6, stop=(stop,))))
    at = free.token_ids.tolist().index(stop) + 1
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids.tolist() == free.token_ids.tolist()[:at]
    full = asyncio.run(engine.generate(request(prompt, new=50)))
    assert full.finish_reason == "context" and len(full.token_ids) == 9
    last = asyncio.run(engine.generate(request(range(11), new=50)))
    assert last.finish_reason == "context" and len(last.token_ids) == 1
    none = asyncio.run(engine.generate(request(range(12), new=50)))
    assert none.finish_reason == "context" and len(none.token_ids) == len(none.logprobs) == 0


def test_other_coroutines_advance_between_steps():
    engine, ticks = make_engine(), 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def both():
        ticker = asyncio.create_task(tick())
        await engine.generate(request([1, 2], new=30))
        ticker.cancel()

    asyncio.run(both())
    assert ticks >= 25
