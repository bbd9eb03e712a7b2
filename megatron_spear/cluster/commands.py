"""The command lines of a node's processes, as pure functions of the settings.

docs/engines.md says what each server needs; tools/sglang_cpu and tools/vllm_cpu have the flags of a
CPU.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_spear.cluster.roles import first_server_gpu
from megatron_spear.config.cluster import NetworkSection
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.fp8_format import CONFIG

_RECEIVER_SGLANG = "megatron_spear.weight_sync.receivers.sglang.load"
_RECEIVER_VLLM = "megatron_spear.weight_sync.receivers.vllm.WorkerExtension"
_TRANSFER_VLLM = {"backend": "megatron_spear"}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command line, and environment variables on top of the supervisor's own."""

    line: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlace:
    """Where a server goes: ``local`` counts those of its node, ``host`` is what it listens at.

    ``gpus`` are the node's as CUDA names them, ``threads`` torch's for a server on the CPU,
    ``package`` a folder that holds this package and nothing else.
    """

    local: int
    host: str
    port: int
    gpus: Sequence[str]
    threads: int
    package: Path


def listen_host(address: str) -> str:
    """What a server listens at, to be reached at ``address``: this machine alone, or all networks
    (a name may stand for a loopback address on its own node)."""
    return address if address in _LOOPBACK else "0.0.0.0"


def trainer_command(
    config: RunConfig, run: Path, attempt: Path, node: int, master: tuple[str, int]
) -> Command:
    """torchrun with this node's trainer ranks; ``master`` is where all ranks meet, on node 0.

    Nothing is restarted by torchrun: a rank's death ends the attempt.
    """
    cluster = config.cluster
    torchrun = (
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(cluster.trainer_nodes), "--node-rank", str(node)),
        *("--nproc-per-node", str(cluster.ranks_on_a_node), "--max-restarts", "0"),
        *("--master-addr", master[0], "--master-port", str(master[1])),
    )
    job = ["-m", "megatron_spear.cli.train", f"resume={run}", "--attempt", str(attempt)]
    if config.run.stop_after is not None:
        # It belongs to a launch: with resume= that of config.yaml is passed over.
        job.append(f"run.stop_after={config.run.stop_after}")
    environment = {"PYTHONUNBUFFERED": "1", **network_environment(cluster.network)}
    return Command(line=(*torchrun, *job), environment=environment)


def network_environment(network: NetworkSection) -> dict[str, str]:
    """The variables by which NCCL and gloo are told about the network, and the user's own."""
    named = {
        "NCCL_SOCKET_IFNAME": network.interface,
        "GLOO_SOCKET_IFNAME": network.interface,
        "NCCL_IB_HCA": network.ib_hca,
        "NCCL_IB_SL": network.ib_service_level,
        "NCCL_IB_TIMEOUT": network.ib_timeout,
    }
    given = {name: str(value) for name, value in named.items() if value is not None}
    return given | network.environment


def environment_command(address: str, address_file: Path, secret_file: Path) -> Command:
    """An environment worker to be reached at ``address``, which writes that with its port into
    ``address_file`` once it listens."""
    return Command(
        line=(
            *(sys.executable, "-m", "megatron_spear.rollout.env_server"),
            *("--host", listen_host(address), "--reached-at", address),
            *("--address-file", str(address_file), "--secret-file", str(secret_file)),
        )
    )


def engine_command(config: RunConfig, model: Path, place: EnginePlace) -> Command:
    """An engine server of ``cluster.servers`` for the Hugging Face folder ``model``."""
    servers = config.cluster.servers
    build = {"serve": _serve, "sglang": _sglang, "vllm": _vllm}[servers.program]
    line, environment = build(config, model, place)
    environment = network_environment(config.cluster.network) | environment
    if config.cluster.gpus_per_node:
        first = first_server_gpu(config.cluster, config.rollout.colocated)
        first += place.local * servers.tensor_parallel
        own = place.gpus[first : first + servers.tensor_parallel]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    if servers.program != "serve":
        # An environment of its own, which must see this package and none of its neighbours.
        given = config.cluster.network.environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = ":".join(filter(None, (str(place.package), given)))
    return Command(line=(*line, *servers.arguments), environment=environment)


_Built = tuple[list[str], dict[str, str]]


def _python(config: RunConfig) -> str:
    return str(config.cluster.servers.python or sys.executable)


def _serve(config: RunConfig, model: Path, place: EnginePlace) -> _Built:
    rollout, sync = config.rollout, config.weight_sync
    line = [
        *(_python(config), "-m", "megatron_spear.cli.main", "serve", str(model)),
        *("--host", place.host, "--port", str(place.port), "--threads", str(place.threads)),
        *("--max-slots", str(rollout.max_slots), "--max-context", str(rollout.max_context)),
        *("--deadline-s", f"{rollout.engine_deadline_s:g}"),
        *("--update-deadline-s", f"{sync.deadline_s:g}"),
    ]
    if sync.precision == "fp8":
        line += ["--quantization", "fp8"]
    if sync.transport == "sharded":
        line += ["--custom-weight-loader", _RECEIVER_SGLANG]
    return line, {"PYTHONUNBUFFERED": "1"}


def _sglang(config: RunConfig, model: Path, place: EnginePlace) -> _Built:
    servers, sync = config.cluster.servers, config.weight_sync
    line = [
        *(_python(config), "-m", "sglang.launch_server", "--model-path", str(model)),
        *("--host", place.host, "--port", str(place.port)),
        *("--tp-size", str(servers.tensor_parallel)),
        *("--mem-fraction-static", f"{servers.memory_fraction:g}"),
    ]
    if sync.engine_expert_parallel > 1:
        line += ["--ep-size", str(sync.engine_expert_parallel)]
    if config.rollout.colocated:
        line.append("--enable-memory-saver")
    if sync.transport == "sharded":
        line += ["--custom-weight-loader", _RECEIVER_SGLANG]
    if sync.precision == "fp8":
        # The weights are all sent before anything is generated, so that none need be read.
        line += ["--load-format", "dummy", "--json-model-override-args", _fp8_override()]
    return line, {"PYTHONUNBUFFERED": "1"}


def _vllm(config: RunConfig, model: Path, place: EnginePlace) -> _Built:
    servers, sync = config.cluster.servers, config.weight_sync
    line = [
        *(_python(config), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host", place.host, "--port", str(place.port)),
        *("--tensor-parallel-size", str(servers.tensor_parallel)),
        *("--gpu-memory-utilization", f"{servers.memory_fraction:g}"),
        *("--logprobs-mode", "processed_logprobs", "--enable-scale-out"),
        *("--worker-extension-cls", _RECEIVER_VLLM),
        *("--weight-transfer-config", json.dumps(_TRANSFER_VLLM)),
    ]
    if config.rollout.colocated:
        line.append("--enable-sleep-mode")
    if sync.precision == "fp8":
        line += ["--load-format", "dummy", "--hf-overrides", _fp8_override()]
    return line, {"PYTHONUNBUFFERED": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}


def _fp8_override() -> str:
    return json.dumps({"quantization_config": CONFIG})
