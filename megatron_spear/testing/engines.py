"""What every rollout engine must keep to, as checks to run against your own.

    from megatron_spear.testing.engines import check_engine

    def test_my_engine():
        with EventLoop("checks") as loop:
            check_engine(loop, lambda: MyEngine(folder), update=lambda e, v: e.load(folder, v))

Each check makes engines of its own, works with them on ``loop`` and raises ContractViolation with
what was got and expected. Token ids 1 to 20 occur in the prompts; ``make`` gives an engine with
room for 40 tokens at least. ``update(engine, version)`` brings the weights that ``make``'s engines
start with into the engine as that version, while it is paused.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import (
    Generation,
    GenerationRequest,
    PauseMode,
    RolloutEngine,
    SamplingParams,
)
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.testing.contract import fail
from megatron_spear.types import VersionSpan

Make = Callable[[], RolloutEngine]
Update = Callable[[Any, int], None]

LOGPROB_TOLERANCE = 1e-4
"""Largest difference of a token's log-prob between two batches (float32 sums in other orders)."""
_LIMIT_S = 120.0


def check_engine(loop: EventLoop, make: Make, *, update: Update, seeded: bool = True) -> None:
    """All checks below; not ``seeded``: of an engine whose draws no seed repeats, greedy ones
    alone are compared."""
    check_answers(loop, make)
    check_finish_reasons(loop, make)
    if seeded:
        check_draws(loop, make)
    check_top_p(loop, make, seeded=seeded)
    check_sessions(loop, make)
    check_weights(loop, make, update)
    check_pause(loop, make, update)
    check_errors(loop, make)


def check_answers(loop: EventLoop, make: Make) -> None:
    """Tokens int32 ``[A]``, one log-prob <= 0 each, float32, and no more than asked for."""
    asks = [_ask(i, new=1 + i % 5, temperature=(0.0, 0.7, 1.0)[i % 3]) for i in range(9)]
    for ask, answer in zip(asks, _generate(loop, make(), asks), strict=True):
        tokens, logprobs = answer.token_ids, answer.logprobs
        for name, array, dtype in (("tokens", tokens, "int32"), ("log-probs", logprobs, "float32")):
            if array.ndim != 1 or array.dtype != dtype:
                fail(f"{name} are", f"{array.dtype} {list(array.shape)}", f"{dtype} [A]")
        if not 1 <= len(tokens) <= ask.sampling.max_new_tokens:
            fail("an answer has", f"{len(tokens)} tokens", f"1..{ask.sampling.max_new_tokens}")
        if len(logprobs) != len(tokens):
            fail("there are", f"{len(logprobs)} log-probs", f"{len(tokens)}, one a token")
        if not (np.isfinite(logprobs).all() and (logprobs <= 0).all()):
            fail("log-probs are", str(logprobs), "finite numbers <= 0")


def check_finish_reasons(loop: EventLoop, make: Make) -> None:
    """``stop`` with the stop token last, ``length`` at max_new_tokens, ``context`` at the limit."""
    engine = make()
    (free,) = _generate(loop, engine, [_ask(0, new=6, temperature=0.0)])
    _expect_end(free, "length", 6)
    stop = int(free.token_ids[2])
    first = free.token_ids.tolist().index(stop) + 1
    (stopped,) = _generate(loop, engine, [_ask(0, new=6, temperature=0.0, stop=(stop,))])
    _expect_end(stopped, "stop", first)
    _expect_same(stopped.token_ids, free.token_ids[:first], "the tokens before a stop are")
    for room in (2, 1, 0):
        prompt = [1 + i % 20 for i in range(engine.max_context - room)]
        (full,) = _generate(loop, engine, [_ask(0, new=6, prompt=prompt)])
        _expect_end(full, "context", room)


def check_draws(loop: EventLoop, make: Make) -> None:
    """The seed keys the draw: neither the batch, nor the order, nor the session changes it."""
    asks = [_ask(i) for i in range(12)]
    together = _generate(loop, make(), asks)
    turned = _generate(loop, make(), asks[::-1])[::-1]
    alone = [_generate(loop, make(), [_ask(i, session=f"alone {i}")])[0] for i in (0, 7)]
    pairs = [*zip(together, turned, strict=True), (together[0], alone[0]), (together[7], alone[1])]
    for one, other in pairs:
        _expect_same(other.token_ids, one.token_ids, "the tokens of the same seed are")
        if np.abs(other.logprobs - one.logprobs).max() > LOGPROB_TOLERANCE:
            fail("log-probs of the same seed are", str(other.logprobs), str(one.logprobs))
    prompt = [3, 1, 4]
    drawn = _generate(loop, make(), [_ask(i, prompt=prompt) for i in range(12)])
    if len({tuple(answer.token_ids) for answer in drawn}) == 1:
        fail("12 seeds drew", "the same tokens", "different ones")
    greedy = _generate(loop, make(), [_ask(i, prompt=prompt, temperature=0.0) for i in range(12)])
    for answer in greedy:
        _expect_same(answer.token_ids, greedy[0].token_ids, "greedy tokens of another seed are")


def check_top_p(loop: EventLoop, make: Make, *, seeded: bool = True) -> None:
    """A small top_p leaves the likeliest token alone, at any temperature and seed; a request of
    top_p 1 beside it draws what it draws alone (where seeds repeat)."""
    prompt = [3, 1, 4]
    (greedy,) = _generate(loop, make(), [_ask(0, prompt=prompt, temperature=0.0)])
    narrow = [_ask(i, prompt=prompt, temperature=1.5, top_p=1e-6) for i in range(6)]
    whole = [_ask(i) for i in range(6, 12)]
    together = _generate(loop, make(), [*narrow, *whole])
    for answer in together[:6]:
        _expect_same(answer.token_ids, greedy.token_ids, "tokens of top_p 1e-6 are")
        if not (np.isfinite(answer.logprobs).all() and (answer.logprobs <= 0).all()):
            fail("log-probs of top_p 1e-6 are", str(answer.logprobs), "finite numbers <= 0")
    if not seeded:
        return
    for answer, alone in zip(together[6:], _generate(loop, make(), whole), strict=True):
        _expect_same(answer.token_ids, alone.token_ids, "beside a small top_p, tokens of 1 are")


def check_sessions(loop: EventLoop, make: Make) -> None:
    """What is kept of a session, or was released, does not change the next answer."""
    first = _ask(0, session="s", temperature=0.0)
    second = _ask(1, prompt=[2, 3, 4, 5, 6, 7], session="s", temperature=0.0)
    (expected,) = _generate(loop, make(), [second])
    for release in (None, "s", "nobody"):
        engine = make()
        _generate(loop, engine, [first])
        if release is not None:
            loop.run(_release(engine, release))
        (answer,) = _generate(loop, engine, [second])
        _expect_same(answer.token_ids, expected.token_ids, f"after release({release!r}) tokens are")


def check_weights(loop: EventLoop, make: Make, update: Update) -> None:
    """An update sets the version that answers report; equal weights give equal answers."""
    engine = make()
    (before,) = _generate(loop, engine, [_ask(0, temperature=0.0)])
    _expect_versions(before, engine.policy_version)
    loop.run(engine.pause("retract"))
    update(engine, 7)
    loop.run(engine.resume())
    (after,) = _generate(loop, engine, [_ask(0, temperature=0.0)])
    if engine.policy_version != 7:
        fail("after an update to 7 the engine is of version", f"{engine.policy_version}", "7")
    _expect_versions(after, 7)
    _expect_same(after.token_ids, before.token_ids, "after an update to equal weights, tokens are")


def check_pause(loop: EventLoop, make: Make, update: Update) -> None:
    """A pause in the middle, with an update to equal weights, changes no token; each token has its
    version, and after ``abort`` all have the new one."""
    asks = [_ask(i, new=24, temperature=0.0) for i in range(4)]
    whole = _generate(loop, make(), asks)
    modes: tuple[PauseMode, ...] = ("retract", "abort")
    for mode in modes:
        engine = make()
        going = [loop.start(engine.generate(ask)) for ask in asks]
        loop.run(asyncio.sleep(0.01))
        loop.run(engine.pause(mode))
        late = loop.start(engine.generate(_ask(9, new=2)))
        loop.run(asyncio.sleep(0.5))  # answers given before the pause arrive
        open_ones = [future for future in going if not future.done()]
        update(engine, 7)
        if late.done():
            fail(f"a request while paused ({mode}) was", "answered", "held back")
        loop.run(engine.resume())
        _expect_versions(late.result(_LIMIT_S), 7)
        for future, expected in zip(going, whole, strict=True):
            answer = future.result(_LIMIT_S)
            _expect_same(answer.token_ids, expected.token_ids, f"after a pause ({mode}) tokens are")
            if np.abs(answer.logprobs - expected.logprobs).max() > LOGPROB_TOLERANCE:
                fail(f"after {mode} log-probs are", str(answer.logprobs), str(expected.logprobs))
            if future in open_ones and mode == "abort":
                _expect_versions(answer, 7)
            if sum(span.num_tokens for span in answer.versions) != len(answer.token_ids):
                fail("versions are", str(answer.versions), f"{len(answer.token_ids)} tokens' worth")
            if future in open_ones and answer.versions[-1].policy_version != 7:
                fail("what was under way ended at", str(answer.versions), "version 7")


def check_errors(loop: EventLoop, make: Make) -> None:
    """What cannot be served is an EngineError that names the session; the engine goes on after."""
    engine = make()
    wrong = {
        "an empty prompt": _ask(0, prompt=[], session="odd"),
        "max_new_tokens 0": _ask(0, new=0, session="odd"),
        "temperature -1": _ask(0, temperature=-1.0, session="odd"),
        "temperature nan": _ask(0, temperature=float("nan"), session="odd"),
        "top_p 0": _ask(0, top_p=0.0, session="odd"),
        "top_p 1.5": _ask(0, top_p=1.5, session="odd"),
    }
    for what, ask in wrong.items():
        _expect_engine_error(loop, engine, ask, what, naming="odd")
    _generate(loop, engine, [_ask(0, session="odd")])
    loop.run(engine.close())
    _expect_engine_error(loop, engine, _ask(0), "a request after close", naming="closed")


def _ask(
    number: int,
    *,
    new: int = 5,
    prompt: Sequence[int] | None = None,
    session: str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: tuple[int, ...] = (),
) -> GenerationRequest:
    """Request ``number``, with a prompt and a seed of its own unless told otherwise."""
    tokens = [1 + (number + i * i) % 20 for i in range(2 + number)] if prompt is None else prompt
    return GenerationRequest(
        session=f"session {number}" if session is None else session,
        token_ids=np.array(tokens, np.int32),
        sampling=SamplingParams(
            temperature=temperature, top_p=top_p, max_new_tokens=new, stop_token_ids=stop
        ),
        seed=(3, number),
    )


def _generate(
    loop: EventLoop, engine: RolloutEngine, asks: Sequence[GenerationRequest]
) -> list[Generation]:
    """The answers to requests made at once."""

    async def all_of_them() -> list[Generation]:
        async with asyncio.timeout(_LIMIT_S):
            return await asyncio.gather(*(engine.generate(ask) for ask in asks))

    return loop.run(all_of_them())


def _expect_end(answer: Generation, reason: str, size: int) -> None:
    if answer.finish_reason != reason or len(answer.token_ids) != size:
        got = f"{len(answer.token_ids)} tokens with finish_reason {answer.finish_reason!r}"
        fail("an answer has", got, f"{size} with {reason!r}")


def _expect_same(got: Any, expected: Any, what: str) -> None:
    if got.tolist() != expected.tolist():
        fail(what, str(got.tolist()), str(expected.tolist()))


def _expect_versions(answer: Generation, version: int) -> None:
    """All tokens of one version."""
    expected = (VersionSpan(version, len(answer.token_ids)),)
    if answer.versions != expected:
        fail("an answer is of the versions", str(answer.versions), str(expected))


async def _release(engine: RolloutEngine, session: str) -> None:
    engine.release(session)


def _expect_engine_error(
    loop: EventLoop, engine: RolloutEngine, ask: GenerationRequest, what: str, *, naming: str
) -> None:
    try:
        _generate(loop, engine, [ask])
    except EngineError as error:
        if naming not in str(error):
            fail(f"the error of {what} is", repr(str(error)), f"one that names {naming!r}")
    else:
        fail(f"{what} was", "answered", "an EngineError")
