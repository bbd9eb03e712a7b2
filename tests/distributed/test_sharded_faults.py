"""What goes wrong between trainer and engines: all learn of it within the deadline, engines that
have all weights go on, and the next update heals the others."""

import contextlib
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_spear.conversion.shape import ModelShape
from megatron_spear.errors import EngineError
from megatron_spear.testing.engine_servers import RankServer, Servers
from megatron_spear.testing.engine_shards import engine_parameters
from megatron_spear.testing.ranks import RankFailed, run_ranks
from megatron_spear.testing.training_ranks import random_weights, rank_slices
from megatron_spear.weight_sync.layouts import TrainingLayout
from megatron_spear.weight_sync.sharded.sender import Packer
from megatron_spear.weight_sync.sharded.transport import Sharded

SHAPE = ModelShape(
    family="qwen3", num_layers=4, hidden_size=64, ffn_size=128, num_heads=4, num_groups=2,
    head_dim=16, vocab_size=300, norm_eps=1e-6, rope_theta=1e4, qk_norm=True,
)  # fmt: skip
LAYOUT = TrainingLayout(tensor=2)
LIMIT_S = 8.0
"""The deadline of updates in which somebody hangs."""
SLACK_S = 4.0
LOST = "weight_sync/num_taken_out"


class Source:
    """One training rank's weights, others at each update."""

    def __init__(self, rank: int) -> None:
        self.rank, self.seed = rank, 0

    def local_slices(self) -> Any:
        self.seed += 1
        return rank_slices(random_weights(SHAPE, seed=self.seed), SHAPE, LAYOUT, self.rank)


def local_parameters(rank: int, size: int) -> dict[str, Any]:
    own = engine_parameters(random_weights(SHAPE), SHAPE, rank=rank, size=size)
    return {name: (tuple(value.shape), value.dtype) for name, value in own.items()}


def transport_of(servers: Any, deadline_s: float, control_s: float = 60.0) -> tuple[Any, Source]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=control_s))
    rank = dist.get_rank()
    source = Source(rank)
    transport = Sharded(
        source=source,
        ranks=SimpleNamespace(
            rank=rank, world_size=2, device=torch.device("cpu"), control=dist.group.WORLD
        ),
        servers=servers,
        model=SHAPE,
        training=LAYOUT,
        host="127.0.0.1",
        bucket_bytes=20_000,
        precision="model",
        deadline_s=deadline_s,
    )
    return transport, source


def two_engines() -> Servers | None:
    """On the controller two servers of one rank."""
    if os.environ["RANK"] != "0":
        return None
    return Servers([RankServer(f"engine {n}", [local_parameters(0, 1)], 60.0) for n in (0, 1)])


def whole(servers: Servers, number: int, seed: int) -> bool:
    """Whether a server has all weights of that seed, and says so."""
    server = servers.servers[number]
    expected = engine_parameters(random_weights(SHAPE, seed=seed), SHAPE, rank=0, size=1)
    found = server.weights(0)
    return server.version == seed and all(torch.equal(found[n], v) for n, v in expected.items())


def one_engine_fails(how: str) -> dict[str, Any]:
    servers = two_engines()
    transport, _ = transport_of(servers, LIMIT_S if how == "hang" else 60.0)
    told: dict[str, Any] = {}
    transport.publish(1)
    if servers:
        servers.servers[1].tell(0, "fail", how, 3)
    begin = time.monotonic()
    told["lost"] = transport.publish(2).get(LOST, 1.0)
    told["seconds"] = time.monotonic() - begin
    if servers:
        told["out"], told["first"] = dict(servers.out), whole(servers, 0, 2)
        told["log"] = servers.servers[1].log[-2:]
        servers.servers[1].start()
    told["lost after"] = transport.publish(3).get(LOST, 0.0)
    if servers:
        told["healed"] = [whole(servers, n, 3) for n in (0, 1)] + [not servers.out]
        told["paused"] = servers.log
    transport.close()
    for server in servers.servers if servers else ():
        server.close()
    return told


@pytest.mark.parametrize("how", ["die", "hang"])
def test_an_engine_that_fails_is_taken_out_and_heals(how: str) -> None:
    first, second = run_ranks(one_engine_fails, 2, how, timeout_s=120)
    limit = LIMIT_S + SLACK_S if how == "hang" else SLACK_S
    for told in (first, second):
        assert told["lost"] == 1.0 and told["lost after"] == 0.0
        assert told["seconds"] < limit
    assert list(first["out"]) == ["engine 1"] and "training rank" in first["out"]["engine 1"]
    assert first["first"] and first["healed"] == [True] * 3
    assert first["log"] == ["begin", "receive"], "its update is not ended"
    assert first["paused"] == ["pause", "resume"] * 3


def a_new_process_in_its_place() -> list[bool]:
    servers = two_engines()
    transport, _ = transport_of(servers, 60.0)
    transport.publish(1)
    if servers:
        servers.servers[0].start()
        servers.servers[0].serving = False  # what a fleet says of a server that was away
    transport.publish(2)
    with pytest.raises(EngineError, match="version 2 is published after 2"):
        transport.publish(2)
    told = [whole(servers, n, 2) for n in (0, 1)] if servers else []
    transport.close()
    for server in servers.servers if servers else ():
        server.close()
    return told


def test_a_server_that_was_started_anew_gets_a_new_group() -> None:
    first, second = run_ranks(a_new_process_in_its_place, 2, timeout_s=60)
    assert first == [True, True] and second == []


def no_engine_is_left() -> list[str]:
    servers = two_engines()
    transport, _ = transport_of(servers, 60.0)
    told = []
    for server in servers.servers if servers else ():
        server.tell(0, "fail", "die", 2)
    for version in (1, 2):
        if version == 2 and servers:
            servers.servers.clear()
        try:
            transport.publish(version)
        except EngineError as error:
            told.append(str(error))
    return told


def test_without_an_engine_every_rank_knows() -> None:
    for told in run_ranks(no_engine_is_left, 2, timeout_s=60):
        assert "no engine server has taken policy version 1" in told[0]
        assert "engine 0: " in told[0] and "engine 1: " in told[0]
        assert "none is reachable" in told[1]


def misfit(change: str) -> list[Any]:
    servers = None
    if os.environ["RANK"] == "0":
        parameters = [local_parameters(rank, 2) for rank in range(2)]
        name = "model.layers.1.self_attn.o_proj.weight"
        if change == "missing":
            del parameters[1][name]
        elif change == "shape":
            parameters[1][name] = ((64, 16), torch.bfloat16)
        else:
            parameters[1][name] = (parameters[1][name][0], torch.float32)
        servers = Servers([RankServer("engine", parameters, 60.0)])
    transport, _ = transport_of(servers, 60.0)
    begin = time.monotonic()
    try:
        transport.publish(1)
    except EngineError as error:
        held = [servers.servers[0].weights(rank) for rank in (0, 1)] if servers else []
        untouched = not any(value.any() for own in held for value in own.values())
        return [str(error), untouched, time.monotonic() - begin]
    finally:
        for server in servers.servers if servers else ():
            server.close()
    return ["it was taken", False, 0.0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("missing", "the engine has no model.layers.1.self_attn.o_proj.weight"),
        ("shape", "o_proj.weight is (64, 16) in the engine, the trainer sends"),
        ("dtype", "o_proj.weight is float32 in the engine and bfloat16 in the trainer"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_received(change: str, text: str) -> None:
    for told, untouched, seconds in run_ranks(misfit, 2, change, timeout_s=60):
        assert "rank 1: " in told and text in told
        assert untouched and seconds < SLACK_S


def die_alone(done: Path) -> None:
    """Kill this rank; its pipe to the test stays open until the others are done."""
    if os.fork() == 0:
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                    os.close(int(entry))
        limit = time.monotonic() + 40
        while not done.exists() and time.monotonic() < limit:
            time.sleep(0.1)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def sender_dies(done: Path) -> None:
    servers = two_engines()
    transport, source = transport_of(servers, LIMIT_S)
    transport.publish(1)
    if source.rank == 1:
        count, pack = 0, Packer.as_it_lies

        def dying(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == 10:
                die_alone(done)
            return pack(*args)

        Packer.as_it_lies = dying  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        transport.publish(2)
        told = "it was taken"
    except EngineError as error:
        told = f"{time.monotonic() - begin:.1f} {error}"
    assert servers is not None
    alive = [server.tell(0, "stored") is not None for server in servers.servers]
    done.with_suffix(".tmp").write_text(f"{told}\n{alive} {servers.log}")
    done.with_suffix(".tmp").rename(done)
    for server in servers.servers:
        server.close()


def test_a_training_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    done = tmp_path / "told"
    with pytest.raises(RankFailed, match="rank 1 of 2 died"):
        run_ranks(sender_dies, 2, done, timeout_s=90)
    first, *_, last = done.read_text().splitlines()
    seconds, _, told = first.partition(" ")
    assert float(seconds) < LIMIT_S + SLACK_S and "training rank" in told
    assert last == "[True, True] ['pause', 'resume', 'pause', 'resume']"
