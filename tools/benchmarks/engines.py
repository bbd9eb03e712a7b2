#!/usr/bin/env python3
"""Tokens per second of the embedded engine, of ``serve``, and of the real engines where installed.

    python tools/benchmarks/engines.py [--prompts 32] [--new-tokens 64] [--rounds 3]

One turn a prompt, all at once, at temperature 1, from one random fp32 model of 4.2 M parameters;
servers are asked by the project's own client over HTTP. The engines take turns round by round, one
thread each. ``per CPU second`` counts the seconds that the engine's processes computed, which a
busy machine changes less; the client's own are left out. SGLang and vLLM are built by
``tools/sglang_cpu/setup.sh`` and ``tools/vllm_cpu/setup.sh``.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megatron_spear.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.testing.real_engines import SGLANG, VLLM, sglang_server, vllm_server
from megatron_spear.testing.serve import serve_in_process
from megatron_spear.testing.served_engines import ServedEngines
from megatron_spear.testing.tiny import tiny_hf_folder

VOCAB, PROMPT_TOKENS, CONTEXT = 4096, 32, 512
SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "head_dim": 32,
}
SIZE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": VOCAB}


def requests(count: int, new_tokens: int, round_number: int) -> list[GenerationRequest]:
    """Prompts of their own in every round, so that no cached prefix helps."""
    draw = np.random.default_rng(round_number)
    return [
        GenerationRequest(
            session=f"{round_number}/{number}",
            token_ids=draw.integers(0, VOCAB, PROMPT_TOKENS).astype(np.int32),
            sampling=SamplingParams(temperature=1.0, max_new_tokens=new_tokens),
            seed=(round_number, number),
        )
        for number in range(count)
    ]


async def generate_all(engine: RolloutEngine, asks: list[GenerationRequest]) -> int:
    """The tokens drawn."""
    answers = await asyncio.gather(*map(engine.generate, asks))
    for ask in asks:
        engine.release(ask.session)
    return sum(len(answer.token_ids) for answer in answers)


def cpu_seconds(pid: int) -> Callable[[], float]:
    """What a process and its children have computed so far."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return lambda: sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tiny_hf_folder(folder, **SIZE, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
        loop = stack.enter_context(EventLoop("bench", lambda: torch.set_num_threads(1)))
        room = {"max_slots": options.prompts, "max_context": CONTEXT}
        engines: dict[str, tuple[RolloutEngine, Callable[[], float]]] = {
            "embedded": (
                EmbeddedEngine.from_hf(folder, **room, deadline_s=300.0),
                cpu_seconds(os.getpid()),
            )
        }

        def serve(name: str, kind: str, url: str, pid: int) -> None:
            served = stack.enter_context(ServedEngines(loop, kind, [url], folder))
            engines[name] = (served.make(), cpu_seconds(pid))

        slots = ("--max-slots", options.prompts, "--max-context", CONTEXT)
        own = stack.enter_context(serve_in_process(folder, *slots))
        serve("serve", "sglang", own.url, own.process.pid)
        for kind, start in ((SGLANG, sglang_server), (VLLM, vllm_server)):
            if kind.missing:
                print(kind.missing)
                continue
            server = stack.enter_context(start(folder))
            serve(kind.name, kind.name.lower(), server.url, server.pid)
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for number in range(options.rounds + 1):
            for name, (engine, used) in engines.items():
                started, cpu = time.perf_counter(), used()
                asks = requests(options.prompts, options.new_tokens, number)
                tokens = loop.run(generate_all(engine, asks))
                if number:  # the first round warms up
                    seconds, cpu = time.perf_counter() - started, used() - cpu
                    rates[name].append((tokens / seconds, tokens / cpu))
        base = statistics.median(rate for rate, _ in rates["embedded"])
        for name, found in rates.items():
            wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
            print(
                f"{name:9} {wall:8,.0f} tokens/s  {wall / base:5.2f}x embedded"
                f"  {cpu:8,.0f} tokens per CPU second"
            )


if __name__ == "__main__":
    main()
