"""KL estimators: hand numbers, gradients, clamps, and their means over a small vocabulary."""

import math

import pytest
import torch

from megatron_spear.algorithms.kl import kl_estimate
from megatron_spear.errors import ConfigError

EXPECTED = {  # (value, gradient) at d = 0.5 and d = -0.5
    "k1": ((0.5, 1.0), (-0.5, 1.0)),
    "abs": ((0.5, 1.0), (0.5, -1.0)),
    "k2": ((0.125, 0.5), (0.125, -0.5)),
    "k3": (
        (math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
        (math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
    ),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_values_and_gradients_by_hand(kind: str) -> None:
    logprobs = torch.tensor([-1.0, -1.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0], dtype=torch.float64, requires_grad=True)
    values = kl_estimate(logprobs, reference, kind)
    values.sum().backward()
    assert values.tolist() == pytest.approx([value for value, _ in EXPECTED[kind]])
    assert logprobs.grad.tolist() == pytest.approx([slope for _, slope in EXPECTED[kind]])
    assert reference.grad.tolist() == pytest.approx([-slope for _, slope in EXPECTED[kind]])


@pytest.mark.parametrize("kind", EXPECTED)
def test_equal_policies_cost_nothing(kind: str) -> None:
    logprobs = torch.tensor([-1.0, -7.0])
    assert kl_estimate(logprobs, logprobs.clone(), kind).tolist() == [0.0, 0.0]


def test_k3_is_clamped_and_flat_there() -> None:
    # exp(d) is clamped at d = 20, the value at 10: both ends of the exponent, and beyond
    logprobs = torch.tensor([-500.0, -3.0, 500.0, 25.0, 5.0], requires_grad=True)
    values = kl_estimate(logprobs, torch.zeros(5), "k3")
    values.sum().backward()
    assert values.tolist() == pytest.approx([10.0, 10.0, 10.0, 10.0, 4 + math.exp(-5)])
    assert logprobs.grad.tolist() == pytest.approx([0, 0, 0, 0, 1 - math.exp(-5)])


def test_k3_keeps_its_digits_where_the_policies_are_close() -> None:
    value = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0001]), "k3")
    assert 0 < value.item() == pytest.approx(5e-9, rel=0.5)


def _policies() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, -0.5, 0.9, 0.4], dtype=torch.float64).log_softmax(-1)
    return logits, logits.log_softmax(-1), reference


def test_k1_and_k3_are_unbiased() -> None:
    _, policy, reference = _policies()
    kl = (policy.exp() * (policy - reference)).sum().item()
    for kind in ("k1", "k3"):
        mean = (policy.exp() * kl_estimate(policy, reference, kind)).sum().item()
        assert mean == pytest.approx(kl, rel=1e-12)


def test_mean_gradients_of_sampled_tokens() -> None:
    logits, policy, reference = _policies()
    (wanted,) = torch.autograd.grad(
        (policy.exp() * (policy - reference)).sum(), logits, retain_graph=True
    )

    def mean_gradient(kind: str) -> torch.Tensor:
        sampled = (policy.detach().exp() * kl_estimate(policy, reference, kind)).sum()
        return torch.autograd.grad(sampled, logits, retain_graph=True)[0]

    torch.testing.assert_close(mean_gradient("k2"), wanted)
    torch.testing.assert_close(mean_gradient("k1"), torch.zeros_like(wanted))


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
