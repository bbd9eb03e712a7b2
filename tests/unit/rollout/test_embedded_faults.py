"""How the embedded engine fails: loudly, for whom it concerns, and usable afterwards."""

import asyncio

import numpy as np
import pytest
import torch
from embedded_cases import CONFIGS, SIZES, make_engine, reference, request, saved_model
from transformers import OlmoConfig

from megatron_spear.errors import ConfigError, EngineError
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.rollout.engines.linear import Linear
from megatron_spear.types import VersionSpan


def _weights(seed: int = 1) -> dict[str, torch.Tensor]:
    tensors = dict(saved_model("qwen3", seed)[0].named_parameters())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_new_weights_are_what_the_engine_draws_from():
    engine, prompt = make_engine(), [4, 8, 15, 16]
    before = asyncio.run(engine.generate(request(prompt)))
    engine.load_weights(iter(_weights(1).items()), 7)
    after = asyncio.run(engine.generate(request([*prompt, *before.token_ids, 3])))
    whole = [*prompt, *before.token_ids.tolist(), 3]
    assert after.versions == (VersionSpan(7, 5),) and engine.policy_version == 7
    assert engine.stats["reused_tokens"] == 0, "keys of the old weights were used"
    new, old = saved_model("qwen3", 1)[0], saved_model("qwen3", 0)[0]
    assert np.abs(after.logprobs - reference(new, whole, after)).max() < 1e-5
    assert np.abs(after.logprobs - reference(old, whole, after)).max() > 1e-2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
        (lambda w: w.update({"model.norm.bias": torch.zeros(32)}), "model.norm.bias"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(31)}), r"model.norm.weight.*\(31,\)"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(61, 32)}), "ties"),
    ],
)
def test_an_incomplete_update_is_named_and_stops_generation(spoil, message):
    engine, weights = make_engine(), _weights()
    spoil(weights)
    with pytest.raises(EngineError, match=message):
        engine.load_weights(weights.items(), 1)
    assert engine.policy_version == 0
    with pytest.raises(EngineError, match="not completed"):
        asyncio.run(engine.generate(request([1])))
    engine.load_weights(_weights().items(), 1)
    assert len(asyncio.run(engine.generate(request([1]))).token_ids) == 5


def test_a_parameter_sent_twice_is_refused():
    weights = list(_weights().items())
    with pytest.raises(EngineError, match="twice"):
        make_engine().load_weights([*weights, weights[3]], 1)


def test_a_tied_head_that_agrees_may_come_along():
    weights = _weights()
    engine = make_engine()
    engine.load_weights(
        (weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}).items(), 2
    )
    assert engine.policy_version == 2


def test_weights_may_not_change_under_a_generation():
    engine = make_engine()

    async def update_in_between():
        running = asyncio.create_task(engine.generate(request([1], new=50)))
        await asyncio.sleep(0.005)
        with pytest.raises(EngineError, match="await them"):
            engine.load_weights(_weights().items(), 1)
        return await running

    assert asyncio.run(update_in_between()).versions == (VersionSpan(0, 50),)


def test_non_finite_logits_fail_only_the_requests_that_have_them():
    engine, weights = make_engine(), _weights(0)
    weights["model.embed_tokens.weight"][40] = float("nan")
    # With the head untied by hand only prompts that read token 40 are spoilt.
    decoder = engine._decoder.weights
    decoder.head = Linear(decoder.embedding.clone())
    decoder.embedding[40] = float("nan")

    async def both():
        asks = (request([1, 40, 2], "bad"), request([1, 3, 2], "good"))
        return await asyncio.gather(*map(engine.generate, asks), return_exceptions=True)

    bad, good = asyncio.run(both())
    assert isinstance(bad, EngineError) and "not finite" in str(bad) and "'bad'" in str(bad)
    assert len(good.token_ids) == 5
    # Nothing of it stays behind: longer contexts in the same slots are finite.
    later = [asyncio.run(engine.generate(request(range(30), f"{i}"))) for i in range(4)]
    assert all(np.isfinite(answer.logprobs).all() for answer in later)


def test_nan_weights_fail_every_request_and_the_next_update_heals():
    engine = make_engine()
    spoilt = _weights()
    spoilt["model.norm.weight"][:] = float("nan")
    engine.load_weights(spoilt.items(), 1)
    with pytest.raises(EngineError, match="policy version 1"):
        asyncio.run(engine.generate(request([1, 2])))
    engine.load_weights(_weights().items(), 2)
    assert np.isfinite(asyncio.run(engine.generate(request([1, 2]))).logprobs).all()


def test_the_deadline_ends_a_generation_and_frees_its_slot():
    engine = make_engine(max_slots=1, deadline_s=0.02, max_context=256)
    with pytest.raises(EngineError, match=r"'slow' took more than 0.02 s"):
        asyncio.run(engine.generate(request([1], "slow", new=255)))
    assert engine._cache.slot_of("slow") is None, "the slot is still owned"
    engine.deadline_s = 20.0
    assert len(asyncio.run(engine.generate(request([1], "next"))).token_ids) == 5


def test_a_cancelled_call_frees_its_slot():
    engine = make_engine(max_slots=1, max_context=256)

    async def cancel_first():
        first = asyncio.create_task(engine.generate(request([1], "first", new=250)))
        second = asyncio.create_task(engine.generate(request([2], "second", new=3)))
        await asyncio.sleep(0.01)
        first.cancel()
        answer = await second
        with pytest.raises(asyncio.CancelledError):
            await first
        return answer

    assert len(asyncio.run(cancel_first()).token_ids) == 3
    assert engine.stats["sampled_tokens"] < 250
    assert engine._cache.slot_of("first") is None


def test_the_engine_task_dying_fails_whoever_waits(monkeypatch):
    engine = make_engine()

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._decoder, "decode", broken)
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(engine.generate(request([1])))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (request([]), "P >= 1"),
        (request([1, 61]), "0..60"),
        (request([-1]), "0..60"),
        (request([1], new=0), "max_new_tokens=0"),
        (request([1], temperature=-1.0), "temperature=-1.0"),
        (request([1], temperature=float("nan")), "temperature=nan"),
    ],
)
def test_malformed_requests_are_refused(ask, message):
    with pytest.raises(EngineError, match=message):
        asyncio.run(make_engine().generate(ask))


def test_one_generation_a_session_at_a_time():
    engine = make_engine()

    async def twice():
        asks = (request([1], "s"), request([2], "s"))
        return await asyncio.gather(*map(engine.generate, asks), return_exceptions=True)

    first, second = asyncio.run(twice())
    assert len(first.token_ids) == 5
    assert isinstance(second, EngineError) and "already generating" in str(second)


def test_closing_and_releasing_fail_what_is_under_way():
    engine = make_engine()

    async def released():
        engine.release("s")

    async def stop(how):
        running = asyncio.create_task(engine.generate(request([1], new=80)))
        await asyncio.sleep(0.005)
        await how()
        return await running

    with pytest.raises(EngineError, match="released"):
        asyncio.run(stop(released))
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(stop(engine.close))
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(engine.generate(request([1])))


def test_what_the_decoder_cannot_run_is_refused(tmp_path):
    room = {"max_slots": 1, "deadline_s": 1.0}
    OlmoConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"olmo.*qwen3, qwen3_moe, qwen2, llama"):
        EmbeddedEngine.from_hf(tmp_path, max_context=64, **room)
    folder, most = saved_model()[1], CONFIGS["qwen3"].max_position_embeddings
    with pytest.raises(ConfigError, match=f"max_position_embeddings={most}"):
        EmbeddedEngine.from_hf(folder, max_context=most + 1, **room)
