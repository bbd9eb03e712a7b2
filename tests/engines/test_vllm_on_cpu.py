"""vLLM on a CPU answers with the weights it was given last: tools/vllm_cpu/spear_vllm_cpu.py.

An update is judged by log-probs. Without the extension vLLM reports success, and new checksums,
while it goes on with old weights.
"""

import json
import socket
import urllib.request

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.background import in_background
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.testing.real_engines import requires_vllm, vllm_server
from megatron_spear.testing.tiny import hf_logprobs, tiny_hf_folder

PROMPT = [5, 10, 20, 30, 40]
LIMIT_S = 60.0


def _post(url, body=None):
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:
        return json.loads(reply.read())


def _largest_error(url, model):
    """Of the log-probs of one answer, against this model's; and the version it is of."""
    sampling = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True, "logprobs": 0}
    body = {"token_ids": PROMPT, "sampling_params": sampling}
    (answer,) = _post(f"{url}/inference/v1/generate", body)["choices"]
    with torch.no_grad():
        expected = hf_logprobs(model, np.array(PROMPT + answer["token_ids"]))[len(PROMPT) :]
    got = torch.tensor([entry["logprob"] for entry in answer["logprobs"]["content"]])
    return (got - expected).abs().max().item(), answer["weight_versions"][-1]["version"]


def _update(url, group, folder, version):
    with HfReader(folder) as reader:
        tensors = [(name, reader.get(name)) for name in reader.names]
    update = {
        "names": [name for name, _ in tensors],
        "dtype_names": ["float32"] * len(tensors),
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }
    _post(f"{url}/pause?mode=wait")
    _post(f"{url}/start_weight_update")
    reply = in_background(lambda: _post(f"{url}/update_weights", {"update_info": update}), "update")
    flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in tensors])
    dist.broadcast(flat, src=0, group=group)
    reply.result(LIMIT_S)
    _post(f"{url}/finish_weight_update", {"weight_version": version})
    _post(f"{url}/reset_prefix_cache")
    _post(f"{url}/resume")


@requires_vllm()
@pytest.mark.parametrize(
    ("architecture", "tensor_parallel"), [("Qwen3", 1), ("Qwen3", 2), ("Qwen3Moe", 1)]
)
def test_an_update_reaches_what_vllm_answers(architecture, tensor_parallel, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    size = {"vocab_size": 212}  # two ranks share the vocabulary
    first = tiny_hf_folder(one, architecture, **size)
    second = tiny_hf_folder(other, architecture, initializer_range=0.04, **size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = {"world_size": 1 + tensor_parallel}
    init = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1} | members
    init |= {"group_name": "weights", "group_backend": "gloo"}
    with vllm_server(one, tensor_parallel=tensor_parallel) as server:
        joined = in_background(
            lambda: _post(f"{server.url}/init_weight_transfer_engine", {"init_info": init}), "init"
        )
        group = peer_groups.join(
            backend="gloo",
            host="127.0.0.1",
            port=port,
            rank=0,
            name="weights",
            timeout_s=LIMIT_S,
            **members,
        )
        joined.result(LIMIT_S)
        error, _ = _largest_error(server.url, first)
        assert error < 1e-4
        for folder, held, stale, version in (
            (other, second, first, "1"),
            (one, first, second, "2"),
        ):
            _update(server.url, group, folder, version)
            error, answered = _largest_error(server.url, held)
            assert error < 1e-4 and answered == version
            assert _largest_error(server.url, stale)[0] > 0.1, "the two models differ too little"
        peer_groups.leave(group)
