"""The Triton kernels against the plain passes, in Triton's interpreter where there is no GPU."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from megatron_spear.algorithms import logprobs

kernels = pytest.importorskip(
    "megatron_spear.algorithms.logprobs_triton", reason="triton is not installed"
)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, the last one partly filled."""
    monkeypatch.setattr(kernels, "BLOCK", 16)


@pytest.mark.parametrize("valid", [41, 37, 1, 0])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_statistics(valid: int, with_entropy: bool, small_blocks: None) -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(6, 41)
    logits[2, 0] = 500.0
    if valid > 20 and not with_entropy:
        logits[3, :20] = -torch.inf  # a whole block of no probability
    expected = logprobs._statistics(logits, valid, 1.25, torch.float32, with_entropy)
    found = kernels.statistics(logits, valid, 1.25, with_entropy=with_entropy)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grads", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("valid", [41, 37])
def test_gradient(grads: str, valid: int, small_blocks: None) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 41)
    labels = torch.randint(0, valid, (6,))
    mine = torch.tensor([True, True, False, True, True, True])
    top, total, weighted = logprobs._statistics(logits, valid, 1.25, torch.float32, True)
    lse, entropy = top + total.log(), total.log() - weighted / total
    grad = torch.randn(6) if grads != "entropy" else None
    entropy_grad = torch.randn(6) if grads != "logprob" else None
    values = (logits, labels, mine, lse, entropy, valid, 1.25, grad, entropy_grad)
    torch.testing.assert_close(kernels.gradient(*values), logprobs._gradient(*values))
