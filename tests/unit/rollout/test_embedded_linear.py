"""Packed matrix products give what plain ones give, and follow their weights."""

import pytest
import torch
import torch.nn.functional as F

from megatron_spear.rollout.engines import linear
from megatron_spear.rollout.engines.linear import Linear


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [None, torch.randn(24)])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_packed_and_plain_agree_and_follow_an_update(packed, bias, rows, monkeypatch):
    if not packed:
        monkeypatch.setattr(linear, "can_pack", lambda weight: False)
    elif not linear.can_pack(torch.zeros(1)):
        pytest.skip("this torch has no oneDNN")
    weight, x, residual = torch.randn(24, 16), torch.randn(rows, 16), torch.randn(rows, 24)
    product = Linear(weight, bias)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(product(x), F.linear(x, weight, bias))
            torch.testing.assert_close(
                product.add_to(residual, x), residual + F.linear(x, weight, bias)
            )
        weight.normal_()
        product.pack()


def test_what_is_large_or_bf16_is_not_packed(monkeypatch):
    assert not linear.can_pack(torch.zeros(4, 4, dtype=torch.bfloat16))
    monkeypatch.setattr(linear, "_MAX_PACKED_BYTES", 63)
    assert not linear.can_pack(torch.zeros(4, 4))
