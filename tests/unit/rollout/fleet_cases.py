"""What the tests of HTTP engines share: fleets over fake servers, requests and what they give."""

import asyncio
import contextlib
import zlib

import numpy as np

from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.fleet import Fleet, FleetLimits
from megatron_spear.rollout.engines.labels import Labels
from megatron_spear.rollout.engines.sglang import SGLangServer
from megatron_spear.testing.fake_sglang import FakeSGLang

WEIGHTS = "weights"
VOCAB = 100
PROMPT = (3, 1, 4)


def ask(number=0, *, prompt=PROMPT, new=8, session=None, temperature=1.0, top_p=1.0, stop=()):
    return GenerationRequest(
        session=f"session {number}" if session is None else session,
        token_ids=np.array(prompt, np.int32),
        sampling=SamplingParams(
            temperature=temperature, top_p=top_p, max_new_tokens=new, stop_token_ids=stop
        ),
        seed=(7, number),
    )


def greedy(number=0, **settings):
    return ask(number, temperature=0.0, **settings)


def greedy_tokens(prompt, size, weights=WEIGHTS):
    """What a fake server draws at temperature 0."""
    context = list(prompt)
    for _ in range(size):
        key = repr((weights, len(context), context[-1], 0))
        context.append(zlib.crc32(key.encode()) % VOCAB)
    return context[len(prompt) :]


def sglang(url):
    return SGLangServer(url, update_deadline_s=5.0, probe_deadline_s=2.0)


def limits(**changes):
    settings = {
        "deadline_s": 5.0,
        "max_requests": 64,
        "all_out_s": 0.3,
        "probe_s": 0.05,
        "busy_s": 0.01,
    }
    return FleetLimits(**{**settings, **changes})


async def update(fleet, policy_version, weights=WEIGHTS):
    """All servers that can take weights get them and serve."""
    for member in await fleet.reachable():
        await member.server.load_folder(weights, fleet.labels.label(policy_version))
        await fleet.admit(member, policy_version)


@contextlib.asynccontextmanager
async def fleet_over(num_servers=2, *, version=1, fakes=None, launch=None, step_s=0.0, **changes):
    """A started fleet and its fake servers, which hold ``version`` where that is not None."""
    ours = fakes is None
    if ours:
        fakes = [FakeSGLang(vocab_size=VOCAB, step_s=step_s) for _ in range(num_servers)]
        for fake in fakes:
            await fake.start()
    servers = [sglang(fake.url) for fake in fakes]
    fleet = Fleet(servers, vocab_size=VOCAB, limits=limits(**changes), labels=Labels(launch))
    await fleet.start(wait_s=2.0)
    if version is not None:
        await update(fleet, version)
    try:
        yield fleet, fakes
    finally:
        await fleet.close()
        for fake in fakes if ours else ():
            await fake.kill()


async def until(condition, limit_s=3.0):
    """Wait until the condition holds."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)
