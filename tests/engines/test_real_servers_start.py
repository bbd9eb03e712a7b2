"""The real servers start on a CPU, and their log-probs are transformers' own."""

import json
import os
import urllib.request

import numpy as np
import psutil
import pytest
import torch

from megatron_spear.errors import EngineError
from megatron_spear.testing import real_engines
from megatron_spear.testing.real_engines import (
    SGLANG,
    VLLM,
    requires_sglang,
    requires_vllm,
    sglang_server,
    vllm_server,
)
from megatron_spear.testing.tiny import hf_logprobs, tiny_hf_folder

PROMPTS = [[5, 10, 20, 30, 40], [9, 8, 7], list(range(100, 140))]
NUM_NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder):
    return tiny_hf_folder(folder)


def _post(url, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def _check_logprobs(model, prompt, tokens, logprobs):
    assert len(tokens) == len(logprobs) == NUM_NEW
    with torch.no_grad():
        expected = hf_logprobs(model, np.array(prompt + tokens))[len(prompt) :].numpy()
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-4)


@requires_sglang()
def test_sglang_draws_with_the_logprobs_of_transformers(folder, model):
    sampling = {"temperature": 1.0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    with sglang_server(folder) as server:
        body = {"input_ids": PROMPTS, "sampling_params": sampling, "return_logprob": True}
        answers = _post(f"{server.url}/generate", body)
        processes = _tree(server.pid)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        _check_logprobs(model, prompt, answer["output_ids"], logprobs)
    _check_ended(processes)


@requires_vllm()
def test_vllm_draws_with_the_logprobs_of_transformers(folder, model):
    sampling = {"temperature": 1.0, "max_tokens": NUM_NEW, "ignore_eos": True, "logprobs": 0}
    with vllm_server(folder) as server:
        answers = [
            _post(
                f"{server.url}/inference/v1/generate",
                {"token_ids": prompt, "sampling_params": sampling},
            )["choices"][0]
            for prompt in PROMPTS
        ]
        processes = _tree(server.pid)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logprobs = [entry["logprob"] for entry in answer["logprobs"]["content"]]
        _check_logprobs(model, prompt, answer["token_ids"], logprobs)
    _check_ended(processes)


def _tree(pid):
    leader = psutil.Process(pid)
    return [leader, *leader.children(recursive=True)]


def _check_ended(processes):
    assert len(processes) > 1
    assert [p for p in processes if p.is_running() and p.status() != "zombie"] == []


@requires_sglang()
def test_a_server_ends_with_the_test_that_raises(folder, model):
    with pytest.raises(ZeroDivisionError), sglang_server(folder) as server:
        processes = _tree(server.pid)
        raise ZeroDivisionError
    _check_ended(processes)


@requires_vllm()
def test_a_server_that_cannot_start_shows_its_log(tmp_path):
    with pytest.raises(EngineError, match=r"vLLM ended with status 1\n(.|\n)*config\.json"):
        vllm_server(tmp_path).__enter__()


@pytest.mark.parametrize("kind", [SGLANG, VLLM])
def test_without_an_environment_the_reason_says_what_to_do(kind, monkeypatch, tmp_path):
    monkeypatch.setenv(kind.venv_variable, str(tmp_path))
    reason = f"no real {kind.name} in {tmp_path}: tools/{kind.name.lower()}_cpu/setup.sh builds"
    mark = {"SGLang": requires_sglang, "vLLM": requires_vllm}[kind.name]().mark
    assert mark.args == (True,)
    assert mark.kwargs["reason"].startswith(reason)
    start = {"SGLang": sglang_server, "vLLM": vllm_server}[kind.name]
    with pytest.raises(EngineError, match="no real"), start(tmp_path):
        pass


def test_an_environment_is_named_by_its_variable(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setenv(SGLANG.venv_variable, str(tmp_path))
    assert SGLANG.missing == ""
    assert os.access(real_engines.ROOT / "tools" / "sglang_cpu" / "launch.sh", os.X_OK)
