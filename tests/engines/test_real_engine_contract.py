"""The real servers keep the contract that the embedded engine keeps.

Their draws are not keyed by the request's seed (SGLang's are with deterministic inference only), so
that sampled tokens are not compared; greedy ones and all log-probs are.
"""

import pytest

from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.testing.engines import check_engine
from megatron_spear.testing.real_engines import (
    requires_sglang,
    requires_vllm,
    sglang_server,
    vllm_server,
)
from megatron_spear.testing.served_engines import ServedEngines
from megatron_spear.testing.tiny import tiny_hf_folder


@pytest.fixture(scope="module")
def loop():
    with EventLoop("checks") as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_hf_folder(path, intermediate_size=128)
    return path


@requires_sglang()
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_sglang(tensor_parallel, loop, folder):
    short = ("--context-length", "64")
    with (
        sglang_server(folder, tensor_parallel=tensor_parallel, extra=short) as server,
        ServedEngines(loop, "sglang", [server.url], folder) as engines,
    ):
        check_engine(loop, engines.make, update=engines.update, seeded=False)


@requires_vllm()
def test_vllm(loop, folder):
    short = ("--max-model-len", "64")
    with (
        vllm_server(folder, extra=short) as server,
        ServedEngines(loop, "vllm", [server.url], folder) as engines,
    ):
        check_engine(loop, engines.make, update=engines.update, seeded=False)
