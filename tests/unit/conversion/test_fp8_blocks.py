"""Weights in FP8 blocks: hand numbers, rounding bounds, folders that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from megatron_spear.conversion.convert import Layout, hf_to_megatron, megatron_to_hf
from megatron_spear.conversion.fp8_blocks import check, dequantize, quantize
from megatron_spear.conversion.verify import compare
from megatron_spear.errors import CheckpointError
from megatron_spear.testing.tiny import tiny_hf_folder


def reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.ones(rows, columns)
    for r in range(rows):
        for c in range(columns):
            where = (slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
            largest = weight[where].float().abs().max()
            if largest > 0:
                scales[r, c] = largest / 448
            values[where] = (weight[where].float() / scales[r, c]).to(torch.float8_e4m3fn)
    return values, scales


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (300, 130), (1300, 200)])
def test_equals_the_plain_way(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = quantize(weight)
    want_values, want_scales = reference(weight)
    assert torch.equal(scales, want_scales)
    assert torch.equal(values.view(torch.uint8), want_values.view(torch.uint8))
    back = dequantize(values, scales)
    assert ((back - weight.float()).abs() <= weight.float().abs() / 16 + scales.max() / 512).all()
    check("w", weight, values, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_stays_as_it_was(dtype: torch.dtype) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    values, _ = quantize(weight.t())
    assert torch.equal(weight, before)
    assert torch.equal(values.view(torch.uint8), reference(weight.t())[0].view(torch.uint8))


def test_the_result_is_where_the_weight_is() -> None:
    values, scales = quantize(torch.empty(300, 130, device="meta"))
    assert values.device.type == scales.device.type == "meta"
    assert dequantize(values, scales).shape == (300, 130)


def test_by_hand() -> None:
    weight = torch.zeros(130, 2)
    weight[0, 0], weight[1, 0], weight[129, 1] = 4.48, 1.0, -8.96
    values, scales = quantize(weight)
    torch.testing.assert_close(scales, torch.tensor([[0.01], [0.02]]))
    assert values[0, 0].float() == 448 and values[1, 0].float() == 96  # 100 rounded to even
    torch.testing.assert_close(dequantize(values, scales)[1, 0], torch.tensor(0.96))
    assert dequantize(values, scales)[129, 1] == -8.96


def test_zero_blocks_stay_zero() -> None:
    values, scales = quantize(torch.zeros(4, 4))
    assert scales.tolist() == [[1.0]] and not dequantize(values, scales).any()


def test_what_rounding_cannot_explain_is_refused() -> None:
    weight = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    values, scales = quantize(weight)
    with pytest.raises(CheckpointError, match=r"w in FP8 is off by up to .* more than rounding"):
        check("w", weight, values, scales * 1.2)
    with pytest.raises(CheckpointError, match=r"w_scale_inv has shape \(2, 1\)"):
        check("w", weight, values, torch.ones(2, 1))


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe"])
def test_an_exported_folder(architecture: str, tmp_path: Path) -> None:
    model = tiny_hf_folder(tmp_path / "hf", architecture, num_key_value_heads=4)
    hf_to_megatron(tmp_path / "hf", tmp_path / "there", Layout(tensor=2))
    megatron_to_hf(tmp_path / "there", tmp_path / "fp8", dtype="fp8-block")
    with safe_open(tmp_path / "fp8" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    quantized = {name for name, kind in kinds.items() if kind is torch.float8_e4m3fn}
    scaled = {name.removesuffix("_scale_inv") for name in kinds if name.endswith("_scale_inv")}
    assert quantized == scaled
    linear = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    if architecture == "Qwen3":
        assert quantized == linear - {"lm_head.weight"}
    else:  # experts are no modules in transformers; routers stay as they are
        assert sum("experts" in name for name in quantized) == 2 * 8 * 3
        assert not any("mlp.gate.weight" in name for name in quantized)
    settings = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "fp8" and settings["weight_block_size"] == [128, 128]
    outcome = compare(tmp_path / "hf", tmp_path / "fp8")
    assert outcome.differences == () and outcome.num_quantized == len(quantized)


def test_transformers_reads_the_folder(tmp_path: Path) -> None:
    model = tiny_hf_folder(tmp_path / "hf", "Qwen3")
    hf_to_megatron(tmp_path / "hf", tmp_path / "there", Layout())
    megatron_to_hf(tmp_path / "there", tmp_path / "fp8", dtype="fp8-block")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8",
        quantization_config=FineGrainedFP8Config(dequantize=True),
        dtype=torch.float32,
    )
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert (ours - theirs).norm() < 0.04 * theirs.norm(), name
