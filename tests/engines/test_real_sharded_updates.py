"""Weights go slice by slice into the real SGLang and vLLM; log-probs say whether they are there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_spear.config.rollout import RolloutSection, WeightSyncSection
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.real_engines import (
    requires_sglang,
    requires_vllm,
    sglang_server,
    vllm_server,
)
from megatron_spear.testing.tiny import hf_logprobs, tiny_hf_folder

PROMPTS = [[5, 10, 20, 30, 40], [9, 8, 7], list(range(100, 140))]
SIZES = {"Qwen3": {"intermediate_size": 128}, "Qwen3Moe": {"moe_intermediate_size": 128}}
"""On a CPU, SGLang pads what two ranks would hold of others."""
LOADER = ["--custom-weight-loader", "megatron_spear.weight_sync.receivers.sglang.load"]
BACKEND = ["--weight-transfer-config", json.dumps({"backend": "megatron_spear"})]


def generations(engine: Any, loop: Any) -> list[tuple[list[int], list[int], Any]]:
    """(prompt, sampled tokens, their log-probs) of each prompt."""
    from megatron_spear.rollout.engine import GenerationRequest, SamplingParams

    found = []
    for number, prompt in enumerate(PROMPTS):
        request = GenerationRequest(
            session=str(number),
            token_ids=np.array(prompt, np.int32),
            sampling=SamplingParams(temperature=1.0, max_new_tokens=24, stop_token_ids=()),
            seed=number,
        )
        answer = loop.run(engine.generate(request))
        found.append((prompt, answer.token_ids.tolist(), answer.logprobs))
    return found


def publish(folder: Path, own: dict[str, Any], kind: str, url: str, work: Path) -> list[float]:
    """After each of two updates, how far the server's log-probs are from those of the policy."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from megatron_spear.config.schema import OptimizerSection, PolicySection
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy
    from megatron_spear.rollout.event_loop import EventLoop
    from megatron_spear.trainer.engines import make_engine
    from megatron_spear.trainer.transports import make_transport

    section = PolicySection(**own)
    ctx = parallel.initialize(section, seed=0)
    policy = MegatronPolicy.from_hf(folder, section, OptimizerSection(), 10, ctx)
    rollout = RolloutSection(engine=kind, servers=(url,))
    sync = WeightSyncSection(transport="sharded", deadline_s=60.0)
    made = None
    if ctx.is_controller:
        loop = EventLoop("rollout")
        made = (loop, make_engine(rollout, sync, folder, loop))
    transport = make_transport(
        rollout, sync, policy, made, virtual_pipeline=1, model=folder, folder=work
    )
    worst = []
    for update in (1, 2):
        with torch.no_grad():
            for parameter in policy._parameters():
                parameter.mul_(1.0 + update / 4)
        transport.publish(update)
        whole = {n: t.contiguous() for n, t in policy.export_weights() if t is not None}
        if made is None:
            continue
        (work / "config.json").write_text((folder / "config.json").read_text())
        save_file(whole, work / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(work).float().eval()
        for prompt, tokens, logprobs in generations(made[1].engine, made[0]):
            with torch.no_grad():
                expected = hf_logprobs(model, np.array(prompt + tokens))[len(prompt) :]
            worst.append(float(np.abs(logprobs - expected.numpy()).max()))
    transport.close()
    return worst


def check(folder: Path, work: Path, kind: str, url: str, layouts: Sequence[dict[str, Any]]) -> None:
    for own in layouts:
        worst, _ = run_ranks(publish, 2, folder, own, kind, url, work, timeout_s=200)
        assert len(worst) == 2 * len(PROMPTS) and max(worst) < 1e-4, own


@requires_sglang()
@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe"])
def test_sglang_of_two_ranks(tmp_path: Path, architecture: str) -> None:
    folder, work = tmp_path / "model", tmp_path / "work"
    work.mkdir()
    tiny_hf_folder(folder, architecture, **SIZES[architecture])
    split = {"expert_parallel": 2} if architecture == "Qwen3Moe" else {"tensor_parallel": 2}
    with sglang_server(folder, tensor_parallel=2, extra=LOADER) as server:
        check(folder, work, "sglang", server.url, [split])


@requires_vllm()
def test_vllm_of_two_ranks(tmp_path: Path) -> None:
    folder, work = tmp_path / "model", tmp_path / "work"
    work.mkdir()
    tiny_hf_folder(folder, **SIZES["Qwen3"])
    with vllm_server(folder, tensor_parallel=2, extra=BACKEND) as server:
        check(folder, work, "vllm", server.url, [{"pipeline_parallel": 2}])
