"""``/generate``: from SGLang's request to the engine's and back."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import randbits
from typing import Any

import numpy as np
from aiohttp import web

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import Generation, GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.sampling import key_of_signed
from megatron_spear.serving.state import Served
from megatron_spear.serving.wire import (
    Body,
    Refused,
    generate_error,
    read_body,
    require_neutral,
    sampling_error,
    schema_error,
    take,
)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "top_logprobs_num": (0,),
    "token_ids_logprob": (),
    "return_text_in_logprobs": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_sampling_mask": (False,),
    "return_entropy": (False,),
    "lora_path": (),
    "session_params": (),
    "custom_logit_processor": (),
}
_FIELDS = (
    "rid",
    "session_id",
    "text",
    "input_ids",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "log_metrics",
    "priority",
    *_NEUTRAL,
)
_NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 1 << 30),
    "min_p": (0.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "min_new_tokens": (0,),
    "n": (1,),
    "stop": (),
    "stop_regex": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "logit_bias": (),
    "custom_params": (),
}
_SAMPLING = (
    "temperature",
    "top_p",
    "max_new_tokens",
    "stop_token_ids",
    "ignore_eos",
    "sampling_seed",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    *_NEUTRAL_SAMPLING,
)
_DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ask:
    """One prompt of a request."""

    rid: str
    request: GenerationRequest
    logprobs: bool
    skip_special_tokens: bool


async def generate(served: Served, request: web.Request) -> web.Response:
    """Answer one prompt with an object, several with a list."""
    body = await read_body(request, _FIELDS)
    require_neutral(body, _NEUTRAL, "the embedded engine has nothing like it")
    prompts, is_batch = _prompts(served, body)
    asks = _asks(served, body, prompts, is_batch)
    answers: list[Any] = [None] * len(asks)

    async def answer(number: int, ask: _Ask) -> None:
        answers[number] = await _answer(served, ask)

    served.sessions.update((ask.rid, ask.request.session) for ask in asks)
    try:
        async with asyncio.TaskGroup() as group:
            for number, ask in enumerate(asks):
                group.create_task(answer(number, ask))
    except ExceptionGroup as failed:
        raise _first(failed) from None
    finally:
        for ask in asks:
            del served.sessions[ask.rid]
    return web.json_response(answers if is_batch else answers[0])


def _first(failed: ExceptionGroup[Exception]) -> Exception:
    """The refusal among the failures; any other fault is passed on as it is."""
    refusals = [error for error in failed.exceptions if isinstance(error, Refused)]
    return refusals[0] if refusals else failed.exceptions[0]


async def _answer(served: Served, ask: _Ask) -> dict[str, Any]:
    started_s = time.monotonic()
    try:
        generation = await served.engine.generate(ask.request)
    except EngineError as error:
        why = "" if served.held_by is None else f"; {served.held_by}"
        raise generate_error(f"{error}{why}", 503) from None
    return _told(served, ask, generation, time.monotonic() - started_s)


def _told(served: Served, ask: _Ask, answer: Generation, latency_s: float) -> dict[str, Any]:
    """SGLang's answer."""
    tokens = answer.token_ids.tolist()
    spans = served.spans(answer.versions)
    meta: dict[str, Any] = {
        "id": ask.rid,
        "finish_reason": _finish_reason(ask, answer),
        "prompt_tokens": len(ask.request.token_ids),
        "completion_tokens": len(tokens),
        "cached_tokens": answer.cached_tokens,
        "reasoning_tokens": 0,
        "weight_version": spans[-1]["version"],
        "weight_versions": spans,
        "num_retractions": answer.num_retractions,
        "e2e_latency": latency_s,
        "dp_rank": None,
    }
    if ask.logprobs:
        meta["output_token_logprobs"] = _pairs(answer.logprobs.tolist(), tokens)
        meta["output_token_logprobs_length"] = len(tokens)
        scored = answer.prompt_logprobs
        inputs = [] if scored is None else _pairs(scored.tolist(), ask.request.token_ids.tolist())
        if inputs:
            inputs[0][0] = None  # nothing comes before it
        meta["input_token_logprobs"] = inputs
    text = ""
    if served.tokenizer is not None:
        text = served.tokenizer.decode(tokens, skip_special_tokens=ask.skip_special_tokens)
    return {"text": text, "output_ids": tokens, "meta_info": meta}


def _pairs(logprobs: Sequence[float], tokens: Sequence[int]) -> list[list[Any]]:
    return [[logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)]


def _finish_reason(ask: _Ask, answer: Generation) -> dict[str, Any]:
    if answer.finish_reason == "stop":
        return {"type": "stop", "matched": int(answer.token_ids[-1])}
    if answer.finish_reason == "abort":
        return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    return {"type": "length", "length": ask.request.sampling.max_new_tokens}


def _prompts(served: Served, body: Body) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt, and whether they came as a list of prompts."""
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise generate_error(
            "Either text, input_ids or input_embeds should be provided."
            if text is None
            else "text and input_ids are both given; SGLang would pass over one of them"
        )
    if text is not None:
        texts = text if isinstance(text, list) else [text]
        return [_encoded(served, each) for each in texts], isinstance(text, list)
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        return [_checked(served, each) for each in ids], True
    return [_checked(served, ids)], False


def _checked(served: Served, prompt: Any) -> list[int]:
    """Token ids that the model has."""
    if not isinstance(prompt, list) or any(type(token) is not int for token in prompt):
        raise schema_error("input_ids is no list of integers, nor a list of such lists")
    if not prompt:
        raise generate_error("input_ids cannot be empty.")
    vocab = served.config.vocab_size
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise generate_error(
            f"token ids span {min(prompt)}..{max(prompt)}; the vocabulary is 0..{vocab - 1} "
            "(SGLang would end here)"
        )
    return prompt


def _encoded(served: Served, text: Any) -> list[int]:
    if not isinstance(text, str):
        raise schema_error("text is no string, nor a list of strings")
    if served.tokenizer is None:
        raise generate_error(f"{served.settings.model} has no tokenizer; send input_ids")
    return _checked(served, served.tokenizer.encode(text))


def _asks(served: Served, body: Body, prompts: list[list[int]], is_batch: bool) -> list[_Ask]:
    count = len(prompts)
    given = body.get("sampling_params") or {}
    each = given if isinstance(given, list) else [given] * count
    if len(each) != count or not all(isinstance(one, dict) for one in each):
        raise schema_error(f"sampling_params is no object, nor a list of {count} objects")
    rids = _rids(served, body, count, is_batch)
    start = take(body, "logprob_start_len", "an integer", -1)
    if start not in (-1, 0):
        raise generate_error(f"logprob_start_len={start} is not supported; expected -1 or 0")
    logprobs = take(body, "return_logprob", "true or false", False)
    hint = take(body, "session_id", "a string", None)
    if hint is None or is_batch or hint in served.sessions.values():
        hint = None
    asks = []
    for rid, prompt, one in zip(rids, prompts, each, strict=True):
        sampling, seed = _sampling(served, one, len(prompt), logprobs and start == 0)
        ask = GenerationRequest(
            session=rid if hint is None else hint,
            token_ids=np.array(prompt, np.int32),
            sampling=sampling,
            seed=seed,
            score_prompt=logprobs and start == 0,
        )
        skip = take(one, "skip_special_tokens", "true or false", True)
        asks.append(_Ask(rid=rid, request=ask, logprobs=logprobs, skip_special_tokens=skip))
    return asks


def _rids(served: Served, body: Body, count: int, is_batch: bool) -> list[str]:
    rid = body.get("rid")
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(rid, str):
        rid = [f"{rid}_{number}" for number in range(count)] if is_batch else [rid]
    if not isinstance(rid, list) or len(rid) != count or not all(isinstance(r, str) for r in rid):
        raise schema_error(f"rid is no string, nor a list of {count} strings")
    doubled = sorted({one for one in rid if rid.count(one) > 1})
    if doubled:
        raise generate_error(f"Duplicate request IDs detected within the request: {doubled}")
    for one in rid:
        if one in served.sessions:
            raise generate_error(f"Duplicate request ID detected: {one}")
    return rid


def _sampling(
    served: Served, given: Body, prompt_size: int, scores: bool
) -> tuple[SamplingParams, int]:
    """The engine's sampling and the key of the draw."""
    for name in given:
        if name not in _SAMPLING:
            raise sampling_error(f"unknown field `{name}`, expected one of {', '.join(_SAMPLING)}")
    require_neutral(given, _NEUTRAL_SAMPLING, "the embedded engine has temperature and top_p only")
    temperature = take(given, "temperature", "a number", 1.0)
    if not 0.0 <= temperature < float("inf"):
        raise generate_error(
            f"temperature must be a non-negative finite number, got {temperature}."
        )
    top_p = take(given, "top_p", "a number", 1.0)
    if not 0.0 < top_p <= 1.0:
        raise generate_error(f"top_p must be in (0, 1], got {top_p}.")
    max_new = take(given, "max_new_tokens", "an integer", _DEFAULT_NEW_TOKENS)
    if max_new < (0 if scores else 1):
        raise generate_error(
            f"max_new_tokens={max_new}; expected 1 or more, or 0 to score the prompt alone "
            "(return_logprob with logprob_start_len 0)"
        )
    _check_length(prompt_size, max_new, served.engine.max_context)
    ids = take(given, "stop_token_ids", "a list", [])
    if any(type(token) is not int for token in ids):
        raise schema_error("stop_token_ids is no list of integers")
    stop = frozenset(ids) | served.stop_token_ids
    if take(given, "ignore_eos", "true or false", False):
        if ids:
            raise generate_error(
                "ignore_eos makes SGLang pass over stop_token_ids too; leave one of them out"
            )
        stop = frozenset()
    seed = take(given, "sampling_seed", "an integer", None)
    if seed is not None and not -(1 << 63) <= seed < 1 << 63:
        raise generate_error(f"sampling_seed={seed}; expected -2^63 to 2^63 - 1")
    sampling = SamplingParams(
        temperature=float(temperature),
        top_p=float(top_p),
        max_new_tokens=max_new,
        stop_token_ids=tuple(sorted(stop)),
    )
    return sampling, randbits(64) if seed is None else key_of_signed(seed)


def _check_length(prompt_size: int, max_new: int, limit: int) -> None:
    if prompt_size >= limit:
        raise generate_error(
            f"The input ({prompt_size} tokens) is longer than the model's context length "
            f"({limit} tokens)."
        )
    if prompt_size + max_new > limit:
        raise generate_error(
            f"Requested token count exceeds the model's maximum context length of {limit} tokens. "
            f"You requested a total of {prompt_size + max_new} tokens: {prompt_size} tokens from "
            f"the input messages and {max_new} tokens for the completion. Please reduce the number "
            "of tokens in the input messages or the completion to fit within the limit."
        )
