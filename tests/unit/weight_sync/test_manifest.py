"""Names, shapes and dtypes are compared before anything is sent."""

import dataclasses

import pytest
import torch

from megatron_spear.conversion import fp8_blocks
from megatron_spear.errors import EngineError
from megatron_spear.testing.transports import MODEL, RandomSource
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.receivers.places import engine_name

LAYER = "model.layers.3."
EXPERTS = dataclasses.replace(
    MODEL, family="qwen3_moe", num_experts=4, experts_per_token=2, ffn_size=16, tied=False
)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("self_attn.q_proj.weight", "self_attn.qkv_proj.weight"),
        ("self_attn.v_proj.bias", "self_attn.qkv_proj.bias"),
        ("self_attn.k_proj.weight_scale_inv", "self_attn.qkv_proj.weight_scale_inv"),
        ("self_attn.o_proj.weight", "self_attn.o_proj.weight"),
        ("self_attn.q_norm.weight", "self_attn.q_norm.weight"),
        ("mlp.up_proj.weight", "mlp.gate_up_proj.weight"),
        ("mlp.down_proj.weight", "mlp.down_proj.weight"),
        ("mlp.gate.weight", "mlp.gate.weight"),
        ("mlp.experts.12.gate_proj.weight", "mlp.experts.w13_weight"),
        ("mlp.experts.12.up_proj.weight_scale_inv", "mlp.experts.w13_weight_scale_inv"),
        ("mlp.experts.12.down_proj.weight", "mlp.experts.w2_weight"),
    ],
)
def test_names_of_engines(name: str, fused: str) -> None:
    assert engine_name(LAYER + name) == LAYER + fused
    assert engine_name(LAYER + fused) == LAYER + fused


def test_a_qwen3_of_six_layers_has_the_50_parameters_that_sglang_reports() -> None:
    manifest = Manifest.of_model(dataclasses.replace(MODEL, num_layers=6), "model")
    assert len({engine_name(name) for name in manifest.names}) == 50


@pytest.mark.parametrize("model", [MODEL, EXPERTS])
def test_servers_with_fused_or_with_hugging_face_names_pass(model) -> None:
    for precision in ("model", "fp8"):
        manifest = Manifest.of_model(model, precision)
        fused = {engine_name(name) for name in manifest.names}
        assert manifest.problem(fused) is None
        assert manifest.problem(manifest.names) is None
        assert manifest.problem(None) is None
        own = {"model.layers.0.self_attn.attn.k_scale", "model.rotary_emb.cos_sin_cache"}
        assert manifest.problem(fused | own) is None


def test_what_is_unknown_and_what_is_missing_is_named() -> None:
    manifest = Manifest.of_model(MODEL, "model")
    held = {engine_name(name) for name in manifest.names}
    problem = manifest.problem(held - {"model.layers.1.self_attn.qkv_proj.weight"})
    assert problem is not None
    for part in "qkv":
        assert f"model.layers.1.self_attn.{part}_proj.weight" in problem
    problem = manifest.problem(held | {"lm_head.weight"})
    assert problem is not None and "nothing is sent for lm_head.weight" in problem
    problem = manifest.problem([])
    assert problem is not None and f"and {len(manifest.names) - 8} more" in problem


def test_a_precision_that_differs_says_what_to_set() -> None:
    plain, fp8 = (Manifest.of_model(MODEL, precision) for precision in ("model", "fp8"))
    problem = plain.problem(fp8.names)
    assert problem is not None and "set weight_sync.precision=fp8" in problem
    assert fp8.problem(plain.names) is None, "SGLang's names tell nothing of scales"
    some = [name for name in fp8.names if name != "model.layers.0.mlp.down_proj.weight_scale_inv"]
    problem = fp8.problem(some)
    assert problem is not None and "set weight_sync.precision=model" in problem


def test_fp8_sends_linear_layers_in_blocks_with_their_scales_beside_them() -> None:
    source = RandomSource()
    manifest = Manifest.of_model(MODEL, "fp8")
    sent = list(manifest.tensors(source.export_weights()))
    assert {name for name, _ in sent} == set(manifest.names)
    names = [name for name, _ in sent]
    linear = {n for n in source.weights if "_proj." in n}
    assert manifest.quantized == linear
    for name in linear:
        place = names.index(name)
        assert names[place + 1] == name + "_scale_inv"
        (_, values), (_, scales) = sent[place : place + 2]
        assert values.dtype is torch.float8_e4m3fn and scales.dtype is torch.float32
        fp8_blocks.check(name, source.weights[name], values, scales)
    for name, tensor in sent:
        if name in source.weights and name not in linear:
            assert tensor.dtype is source.weights[name].dtype
            assert torch.equal(tensor, source.weights[name])


def _more(weights: dict[str, torch.Tensor]) -> None:
    weights["model.more.weight"] = torch.zeros(2)


def _fewer(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def _transposed(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].t()


def _doubles(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].double()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_more, "exported model.more.weight which its model does not have"),
        (_fewer, "did not export model.norm.weight"),
        (_transposed, r"down_proj.weight of shape \(40, 24\); expected \(24, 40\)"),
        (_doubles, "model.norm.weight in torch.float64; expected"),
    ],
)
def test_an_export_that_is_not_the_model_is_refused(change, told: str) -> None:
    source = RandomSource()
    change(source.weights)
    with pytest.raises(EngineError, match=told):
        list(Manifest.of_model(MODEL, "model").tensors(source.export_weights()))


def test_a_tensor_exported_twice_is_refused() -> None:
    pairs = list(RandomSource().export_weights())
    with pytest.raises(EngineError, match=r"exported model.embed_tokens.weight twice"):
        list(Manifest.of_model(MODEL, "model").tensors([*pairs, pairs[0]]))
