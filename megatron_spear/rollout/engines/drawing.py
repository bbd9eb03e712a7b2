"""One generation from one server, whatever it takes: checks, several requests, assembly."""

import math
from collections.abc import Awaitable, Callable

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import Generation, GenerationRequest
from megatron_spear.rollout.engines.labels import ForeignLabel, Labels
from megatron_spear.rollout.engines.server import Answer, EngineServer, malformed
from megatron_spear.types import VersionSpan

# Asks a server to go on after these token ids, for at most so many more.
Ask = Callable[[list[int], int], Awaitable[Answer]]


class Aborted(EngineError):
    """Somebody ended the generation on the server: a pause that draws anew, say."""


def check_tokens(request: GenerationRequest, vocab_size: int) -> None:
    """Raise EngineError for a malformed request; a token id outside the vocabulary ends SGLang."""
    request.check()
    tokens = request.token_ids
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise EngineError(
            f"request of session {request.session!r}: token ids span {low}..{high}; the vocabulary "
            f"is 0..{vocab_size - 1}"
        )


async def draw(
    server: EngineServer,
    request: GenerationRequest,
    ask: Ask,
    *,
    labels: Labels,
    oldest_version: int,
    max_context: int,
) -> Generation:
    """The generation for a checked request whose prompt leaves room for a token.

    A server may end it at a token that is not among ``stop_token_ids`` (the model's own end
    tokens), or sooner than asked for: it is then asked to go on from there. ``oldest_version``: the
    last token may not be of an older one. Raises Aborted, ForeignLabel, EngineError for log-probs
    that are not finite, and what ``ask`` raises.
    """
    prompt = request.token_ids.tolist()
    tokens: list[int] = []
    logprobs: list[float] = []
    versions: list[VersionSpan] = []
    stops = frozenset(request.sampling.stop_token_ids)
    wanted = min(request.sampling.max_new_tokens, max_context - len(prompt))
    while True:
        so_far = prompt + tokens if tokens else prompt
        answer = await ask(so_far, wanted - len(tokens))
        if answer.reason == "abort":
            raise Aborted(f"{server.name} ended the generation of session {request.session!r}")
        if not 0 < len(answer.token_ids) <= wanted - len(tokens):
            got = f"{len(answer.token_ids)} tokens for {wanted - len(tokens)}"
            raise malformed(server.name, "a generation of the wrong length", got)
        if not stops.isdisjoint(answer.token_ids[:-1]):
            raise malformed(server.name, "a generation that goes on after a stop token", answer)
        tokens += answer.token_ids
        logprobs += answer.logprobs
        versions += labels.spans(answer.labels, server.name)
        reason = request.finish_reason(tokens, max_context)
        if reason is not None:
            break
    _check_versions(versions, len(tokens), oldest_version, server.name)
    _check_finite(logprobs, request, server.name)
    return Generation(
        token_ids=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        finish_reason=reason,
        versions=_merged(versions),
    )


def _check_versions(versions: list[VersionSpan], size: int, oldest: int, server: str) -> None:
    counted = sum(span.num_tokens for span in versions)
    if counted != size:
        raise malformed(server, f"versions of {counted} tokens for {size}", versions)
    last = versions[-1].policy_version
    if last < oldest:
        raise ForeignLabel(
            f"{server} answered with policy version {last} after it had been given {oldest}: it "
            "serves again after the next weight update"
        )


def _check_finite(logprobs: list[float], request: GenerationRequest, server: str) -> None:
    if not math.isfinite(sum(logprobs)):
        raise EngineError(
            f"{server} answered session {request.session!r} with log-probs that are not finite; "
            "check the weights of the last update"
        )


def _merged(versions: list[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Runs of one version joined, without empty ones."""
    if len(versions) == 1:
        return (versions[0],)
    merged: list[VersionSpan] = []
    for version, size in versions:
        if merged and merged[-1].policy_version == version:
            merged[-1] = VersionSpan(version, merged[-1].num_tokens + size)
        elif size:
            merged.append(VersionSpan(version, size))
    return tuple(merged)
