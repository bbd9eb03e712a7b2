"""The command lines, for CPUs and for GPUs."""

import json
import sys
from pathlib import Path

import pytest

from megatron_spear.cluster.commands import (
    EnginePlace,
    engine_command,
    environment_command,
    listen_host,
    trainer_command,
)
from megatron_spear.config.load import load_config

MODEL = Path("/models/m")
GPU_SERVERS = ("cluster.gpus_per_node=8", "cluster.engine_nodes=1", "cluster.servers.count=4")
SGLANG = (
    *GPU_SERVERS,
    "rollout.engine=sglang",
    "cluster.servers.program=sglang",
    "cluster.servers.python=/engines/bin/python",
    "cluster.servers.tensor_parallel=2",
)


def engine(*settings, local=0, gpus=tuple("01234567")):
    place = EnginePlace(
        local=local, host="0.0.0.0", port=4000, gpus=gpus, threads=3, package=Path("/alone")
    )
    return engine_command(load_config(None, settings), MODEL, place)


def values(line):
    """The options of a command line with what follows each."""
    return {a: b for a, b in zip(line, (*line[1:], ""), strict=True) if a.startswith("--")}


def test_torchrun_of_the_second_of_two_nodes():
    config = load_config(None, ["cluster.trainer_nodes=2", "cluster.ranks_per_node=4"])
    command = trainer_command(config, Path("/r"), Path("/r/attempt_3"), 1, ("n0", 999))
    assert command.line[:3] == (sys.executable, "-m", "torch.distributed.run")
    options = values(command.line)
    assert (options["--nnodes"], options["--node-rank"], options["--nproc-per-node"]) == (
        "2",
        "1",
        "4",
    )
    assert (options["--master-addr"], options["--master-port"]) == ("n0", "999")
    assert options["--max-restarts"] == "0"
    assert command.line[-4:] == (
        "megatron_spear.cli.train",
        "resume=/r",
        "--attempt",
        "/r/attempt_3",
    )


def test_the_network_and_where_to_stop_are_passed_on():
    settings = [
        "run.stop_after=2",
        "cluster.network.interface=ib0",
        "cluster.network.ib_hca=mlx5",
        "cluster.network.ib_service_level=0",
        "cluster.network.ib_timeout=22",
        "cluster.network.environment={NCCL_DEBUG: WARN}",
    ]
    command = trainer_command(load_config(None, settings), Path("/r"), Path("/a"), 0, ("h", 1))
    assert command.line[-1] == "run.stop_after=2"
    assert {
        name: v for name, v in command.environment.items() if "CCL" in name or "LOO" in name
    } == {
        "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_IB_HCA": "mlx5",
        "NCCL_IB_SL": "0",
        "NCCL_IB_TIMEOUT": "22",
        "NCCL_DEBUG": "WARN",
    }


def test_serve_takes_the_sizes_of_the_run_and_this_python():
    command = engine(
        "rollout.engine=sglang",
        "cluster.servers.count=1",
        "rollout.max_context=300",
        "rollout.max_slots=12",
        "weight_sync.transport=sharded",
        "cluster.servers.arguments=[--max-slots, '9']",
    )
    assert command.line[:5] == (
        sys.executable,
        "-m",
        "megatron_spear.cli.main",
        "serve",
        str(MODEL),
    )
    options = values(command.line)
    assert (options["--host"], options["--port"], options["--threads"]) == ("0.0.0.0", "4000", "3")
    assert options["--max-context"] == "300"
    assert command.line.count("--max-slots") == 2, "the user's come last, and win"
    assert command.line[-2:] == ("--max-slots", "9")
    assert options["--custom-weight-loader"] == "megatron_spear.weight_sync.receivers.sglang.load"
    assert "PYTHONPATH" not in command.environment
    assert "CUDA_VISIBLE_DEVICES" not in command.environment


def test_the_arguments_of_serve_are_ones_it_knows():
    from megatron_spear.cli.serve import build_parser

    command = engine(
        "rollout.engine=sglang", "weight_sync.precision=fp8", "weight_sync.transport=sharded"
    )
    options = build_parser().parse_args(command.line[4:])
    assert options.model == MODEL
    assert options.quantization == "fp8"


@pytest.mark.parametrize(("local", "gpus"), [(0, "0,1"), (3, "6,7")])
def test_sglang_has_gpus_and_a_python_of_its_own(local, gpus):
    command = engine(*SGLANG, local=local)
    assert command.line[:3] == ("/engines/bin/python", "-m", "sglang.launch_server")
    options = values(command.line)
    assert options["--tp-size"] == "2"
    assert options["--mem-fraction-static"] == "0.85"
    assert command.environment["CUDA_VISIBLE_DEVICES"] == gpus
    assert command.environment["PYTHONPATH"] == "/alone"
    for absent in ("--enable-memory-saver", "--custom-weight-loader", "--load-format", "--ep-size"):
        assert absent not in options


def test_sglang_sharded_colocated_in_fp8_with_experts():
    command = engine(
        *SGLANG,
        "rollout.colocated=true",
        "cluster.engine_nodes=0",
        "weight_sync.transport=sharded",
        "weight_sync.precision=fp8",
        "weight_sync.engine_expert_parallel=2",
    )
    options = values(command.line)
    assert "--enable-memory-saver" in options
    assert options["--custom-weight-loader"] == "megatron_spear.weight_sync.receivers.sglang.load"
    assert options["--ep-size"] == "2"
    assert options["--load-format"] == "dummy"
    override = json.loads(options["--json-model-override-args"])
    assert override["quantization_config"]["weight_block_size"] == [128, 128]


def test_a_path_of_the_users_comes_after_this_package():
    command = engine(*SGLANG, "cluster.network.environment={PYTHONPATH: /mine}")
    assert command.environment["PYTHONPATH"] == "/alone:/mine"


def test_servers_on_trainer_nodes_have_the_gpus_after_the_ranks():
    settings = ("cluster.gpus_per_node=8", "cluster.ranks_per_node=4", "rollout.engine=sglang")
    command = engine(*settings, "cluster.servers.count=4", local=1)
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "5"


def test_gpus_are_those_that_the_job_may_use():
    command = engine(*SGLANG, local=1, gpus=("GPU-a", "GPU-b", "GPU-c", "GPU-d"))
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "GPU-c,GPU-d"


def test_vllm():
    settings = (*GPU_SERVERS, "rollout.engine=vllm", "cluster.servers.program=vllm")
    command = engine(*settings, "rollout.colocated=true", "weight_sync.precision=fp8")
    assert command.line[1:3] == ("-m", "vllm.entrypoints.openai.api_server")
    options = values(command.line)
    assert options["--logprobs-mode"] == "processed_logprobs"
    assert "--enable-scale-out" in options
    assert "--enable-sleep-mode" in options
    assert json.loads(options["--weight-transfer-config"]) == {"backend": "megatron_spear"}
    receiver = "megatron_spear.weight_sync.receivers.vllm.WorkerExtension"
    assert options["--worker-extension-cls"] == receiver
    assert "quantization_config" in json.loads(options["--hf-overrides"])
    assert command.environment["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize(("address", "host"), [("node7", "0.0.0.0"), ("127.0.0.1", "127.0.0.1")])
def test_an_environment_worker(address, host):
    line = environment_command(address, Path("/a/address"), Path("/a/secret")).line
    assert line == (
        *(sys.executable, "-m", "megatron_spear.rollout.env_server"),
        *("--host", host, "--reached-at", address),
        *("--address-file", "/a/address", "--secret-file", "/a/secret"),
    )


def test_a_server_of_one_machine_is_not_seen_from_others():
    assert listen_host("127.0.0.1") == "127.0.0.1"
    assert listen_host("node7") == "0.0.0.0"
