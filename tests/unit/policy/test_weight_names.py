"""Names of TransformerEngine's parameters in the words of the weight tables."""

import pytest

from megatron_spear.policy.weights import local_name

LAYER = "decoder.layers.3."


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("mlp.experts.linear_fc1.weight0", "mlp.experts.local_experts.0.linear_fc1.weight"),
        ("mlp.experts.linear_fc2.weight17", "mlp.experts.local_experts.17.linear_fc2.weight"),
        ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight"),
        ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight"),
        ("pre_mlp_layernorm.weight", "pre_mlp_layernorm.weight"),
        (
            "mlp.experts.local_experts.2.linear_fc1.weight",
            "mlp.experts.local_experts.2.linear_fc1.weight",
        ),
    ],
)
def test_local_names(name: str, local: str) -> None:
    assert local_name(LAYER + name) == LAYER + local
