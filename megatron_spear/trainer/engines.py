"""The rollout engine a run's settings ask for: in this process, or a fleet of servers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.config.rollout import RolloutSection, WeightSyncSection
from megatron_spear.conversion.shape import load_config, model_shape
from megatron_spear.errors import ConfigError, EngineError
from megatron_spear.rollout.engine import RolloutEngine
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.rollout.engines.fleet import Fleet, FleetLimits
from megatron_spear.rollout.engines.fleet_memory import FleetMemory
from megatron_spear.rollout.engines.fleet_updates import FleetUpdates
from megatron_spear.rollout.engines.joining import Joining
from megatron_spear.rollout.engines.router import server_urls
from megatron_spear.rollout.engines.server import EngineServer
from megatron_spear.rollout.engines.sglang import SGLangServer
from megatron_spear.rollout.engines.vllm import VLLMServer
from megatron_spear.rollout.event_loop import EventLoop

_PROBE_S = 20.0
"""Longest wait for what a server answers without work."""


@dataclass(frozen=True, kw_only=True)
class MadeEngine:
    """An engine, the side of its servers that takes weights (None: it is in this process), and
    the memory that they share with training (None: they have their own)."""

    engine: RolloutEngine
    updates: FleetUpdates | None = None
    memory: FleetMemory | None = None


def make_engine(
    rollout: RolloutSection,
    weight_sync: WeightSyncSection,
    model: Path,
    loop: EventLoop,
    list_urls: Callable[[], Sequence[str]] | None = None,
) -> MadeEngine:
    """The engine for a Hugging Face folder's model. An embedded one has its weights; servers serve
    only once they have been given some. ``list_urls`` names those that there are later on.

    Raises EngineError where no server answers.
    """
    if rollout.engine == "embedded":
        return MadeEngine(
            engine=EmbeddedEngine.from_hf(
                model,
                max_slots=rollout.max_slots,
                max_context=rollout.max_context,
                deadline_s=rollout.engine_deadline_s,
            )
        )
    if not rollout.servers:
        raise ConfigError(
            "rollout.servers is empty: the servers of cluster.servers are started by "
            "`megatron-spear launch`; use it, or start servers and list them"
        )
    make_server = SERVERS[rollout.engine]

    def new_server(url: str) -> EngineServer:
        return make_server(url, weight_sync.deadline_s)

    urls = loop.run(server_urls(rollout.servers, deadline_s=_PROBE_S))
    fleet = Fleet(
        list(map(new_server, urls)),
        vocab_size=model_shape(load_config(model)).vocab_size,
        limits=FleetLimits(
            deadline_s=rollout.engine_deadline_s, max_requests=rollout.max_requests_per_server
        ),
        joining=Joining(list_urls, new_server) if list_urls is not None else None,
    )
    try:
        loop.run(fleet.start(wait_s=rollout.engine_deadline_s))
    except BaseException:
        loop.run(fleet.close())
        raise
    return MadeEngine(
        engine=fleet,
        updates=FleetUpdates(fleet, loop, rollout.pause_mode),
        memory=FleetMemory(fleet, loop) if rollout.colocated else None,
    )


def serve_folder(updates: FleetUpdates, model: Path, policy_version: int = 0) -> None:
    """Have all servers load a Hugging Face folder, which they must see under its path, and serve.

    Raises EngineError naming the first server that cannot.
    """
    for server in updates.reachable():
        try:
            server.load_folder(str(model.resolve()), policy_version).result()
        except EngineError as error:
            raise EngineError(f"{server.name} did not load {model.resolve()}: {error}") from error
        updates.admit(server, policy_version)


def _sglang(url: str, update_deadline_s: float) -> EngineServer:
    return SGLangServer(url, update_deadline_s=update_deadline_s, probe_deadline_s=_PROBE_S)


def _vllm(url: str, update_deadline_s: float) -> EngineServer:
    return VLLMServer(url, update_deadline_s=update_deadline_s, probe_deadline_s=_PROBE_S)


SERVERS: Mapping[str, Callable[[str, float], EngineServer]] = {
    "sglang": _sglang,
    "vllm": _vllm,
}
"""What makes the client of one server, by the name of ``rollout.engine``."""
