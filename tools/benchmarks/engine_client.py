"""Requests a second that the HTTP client sustains, alone and under the rollouter, on one core.

The server answers at once, in a process on another core, so that what is measured is our side:
building and sending a request, reading the answer, and for ``rollouter`` a turn's bookkeeping with
an environment in the same process (a corridor) and a word tokenizer. ``cpu_s`` is what the client's
process used: on a machine that others use too, requests per CPU second is the steadier figure.

    python tools/benchmarks/engine_client.py --in-flight 2048 --rounds 3
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import numpy as np

from megatron_spear.config.rollout import RolloutSection
from megatron_spear.envs.alfworld.prompts import alfworld_view
from megatron_spear.envs.protocol import StepResult
from megatron_spear.rollout.chat import ChatRenderer
from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.fleet import Fleet, FleetLimits
from megatron_spear.rollout.engines.sglang import SGLangServer
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.testing.fakes import CHATML, word_tokenizer
from megatron_spear.testing.toy_environment import CorridorEnvironment
from megatron_spear.types import Prompt

WORDS = "walk to place left right nothing happens you are at 0 1 2 3"
LABEL = "0123abcd/1"
DEADLINE_S = 600.0


def serve(port: int, core: int, answer: list[int]) -> None:
    """Answer every POST with the same tokens, and every GET with settings."""
    os.sched_setaffinity(0, {core})
    meta = {
        "id": "0" * 32,
        "finish_reason": {"type": "stop", "matched": answer[-1]},
        "prompt_tokens": 60,
        "completion_tokens": len(answer),
        "cached_tokens": 0,
        "weight_version": LABEL,
        "weight_versions": [{"version": LABEL, "start": 0, "end": len(answer)}],
        "num_retractions": 0,
        "output_token_logprobs": [[-1.2345678806304932, token, None] for token in answer],
        "e2e_latency": 0.123456789,
    }
    posted = _http({"text": "", "output_ids": answer, "meta_info": meta})
    info = _http(
        {"weight_version": LABEL, "tp_size": 1, "dp_size": 1, "max_req_input_len": 1 << 20}
    )

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self._transport, self._data = transport, b""

        def data_received(self, data: bytes) -> None:
            self._data += data
            while (end := self._data.find(b"\r\n\r\n")) >= 0:
                head = self._data[:end]
                at = head.find(b"Content-Length: ")
                size = int(head[at + 16 :].partition(b"\r\n")[0]) if at >= 0 else 0
                if len(self._data) < end + 4 + size:
                    return
                self._data = self._data[end + 4 + size :]
                self._transport.write(info if head.startswith(b"GET") else posted)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Connection, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    asyncio.run(run())


def _http(answer: Mapping[str, Any]) -> bytes:
    body = json.dumps(answer, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class InProcessPool:
    """An ``EnvironmentPool`` without workers."""

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[CorridorEnvironment]:
        """An environment of its own."""
        yield CorridorEnvironment()

    async def reset(
        self, slot: CorridorEnvironment, *, seed: int, options: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Start a task."""
        return slot.reset(seed=seed, options=options)

    async def step(self, slot: CorridorEnvironment, action: str) -> StepResult:
        """Take an action."""
        return slot.step(action)


async def by_client(fleet: Fleet, renderer: ChatRenderer, args: argparse.Namespace) -> int:
    """``in_flight`` coroutines that ask and ask; the number of requests."""
    prompt = np.arange(args.prompt, dtype=np.int32) % 16
    sampling = SamplingParams(max_new_tokens=args.answer, stop_token_ids=renderer.stop_token_ids)

    async def ask(number: int) -> None:
        for turn in range(args.turns):
            await fleet.generate(
                GenerationRequest(
                    session=f"session {number}",
                    token_ids=prompt,
                    sampling=sampling,
                    seed=(0, number, turn),
                )
            )

    await asyncio.gather(*(ask(number) for number in range(args.in_flight)))
    return int(args.in_flight * args.turns)


async def by_rollouter(fleet: Fleet, renderer: ChatRenderer, args: argparse.Namespace) -> int:
    """``in_flight`` trajectories of ``turns`` turns; the number of requests."""
    section = RolloutSection(
        max_slots=args.in_flight, max_new_tokens=args.answer, max_context=1 << 16
    )
    rollouter = Rollouter(
        fleet,
        InProcessPool(),  # type: ignore[arg-type]
        renderer,
        alfworld_view("compact"),
        section,
        history="full",
        max_turns=args.turns,
    )
    system = {"role": "system", "content": "walk " * args.prompt}
    metadata = {"length": 4, "start": 0}
    prompts = [
        Prompt(prompt_id=f"p{i}", env="corridor", messages=(system,), metadata=metadata)
        for i in range(args.in_flight // 8)
    ]
    groups = await rollouter.collect(prompts, group_size=8, seed=(0,), temperature=1.0)
    return sum(len(member.turns) for group in groups for member in group.members)


async def measure(kind: str, url: str, args: argparse.Namespace) -> None:
    """Print one line a round."""
    server = SGLangServer(url, update_deadline_s=60.0, probe_deadline_s=60.0)
    limits = FleetLimits(deadline_s=DEADLINE_S, max_requests=args.in_flight, probe_s=60.0)
    fleet = Fleet([server], vocab_size=1 << 17, limits=limits)
    fleet.labels.launch = LABEL.partition("/")[0]
    await fleet.start(wait_s=30.0)
    await fleet.admit(fleet.roster.members[0], 1)
    renderer = ChatRenderer(word_tokenizer(WORDS.split(), CHATML))
    play = {"client": by_client, "rollouter": by_rollouter}[kind]
    for number in range(args.rounds):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        requests = await play(fleet, renderer, args)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        print(
            f"{kind:9} round {number}: {requests} requests, {requests / wall_s:.0f}/s, "
            f"{requests / cpu_s:.0f} per CPU second, {1e6 * cpu_s / requests:.0f} us each"
        )
    await fleet.close()


@contextlib.contextmanager
def server_process(args: argparse.Namespace) -> Iterator[str]:
    """The server's URL while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, __file__, "--serve", str(port), "--answer", str(args.answer)]
    process = subprocess.Popen([*line, "--server-core", str(args.server_core)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10.0)


def main() -> None:
    """Serve, or measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--in-flight", type=int, default=2048, help="trajectories at once")
    parser.add_argument("--turns", type=int, default=10, help="requests of each")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the first prompt")
    parser.add_argument("--answer", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client-core", type=int, default=0)
    parser.add_argument("--server-core", type=int, default=1)
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        # Words nobody acts on, then the word tokenizer's end token.
        serve(args.serve, args.server_core, [8] * (args.answer - 1) + [2])
        return
    with server_process(args) as url:
        os.sched_setaffinity(0, {args.client_core})
        for kind in ("client", "rollouter"):
            asyncio.run(measure(kind, url, args))


if __name__ == "__main__":
    main()
