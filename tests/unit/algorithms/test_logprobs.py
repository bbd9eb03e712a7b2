"""Log-probs and entropies against log_softmax in float64, whole and split over a fake group."""

import pytest
import torch
from torch import Tensor

from megatron_spear.algorithms import logprobs as module
from megatron_spear.algorithms.logprobs import token_logprobs


def reference(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (logits.double() / temperature).log_softmax(-1)
    return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def inputs(rows: int = 9, vocab: int = 23, dtype: torch.dtype = torch.float64) -> tuple:
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, vocab, generator=draw, dtype=dtype)
    labels = torch.randint(0, vocab, (rows,), generator=draw)
    return logits.requires_grad_(), labels


def test_hand_numbers() -> None:
    logprobs, entropy = token_logprobs(
        torch.tensor([[0.0, 0.0]]), torch.tensor([1]), with_entropy=True
    )
    assert entropy is not None
    torch.testing.assert_close(logprobs, torch.tensor([-0.6931472]))
    torch.testing.assert_close(entropy, torch.tensor([0.6931472]))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("scratch_rows", [0, 2, 256])  # never less than one row at a time
def test_values_and_gradients(
    temperature: float, scratch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCRATCH_BYTES", scratch_rows * 23 * 8)
    logits, labels = inputs()
    grad_p, grad_h = torch.randn(9).double(), torch.randn(9).double()
    logprobs, entropy = token_logprobs(logits, labels, temperature=temperature, entropy_grad=True)
    want_p, want_h = reference(logits, labels, temperature)
    torch.testing.assert_close(logprobs, want_p, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, want_h, rtol=0, atol=1e-12)
    assert entropy is not None
    (got,) = torch.autograd.grad((logprobs * grad_p + entropy * grad_h).sum(), logits)
    (want,) = torch.autograd.grad((want_p * grad_p + want_h * grad_h).sum(), logits)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_logprobs_alone_have_the_same_gradient() -> None:
    logits, labels = inputs()
    logprobs, entropy = token_logprobs(logits, labels, with_entropy=True)
    assert entropy is not None and not entropy.requires_grad
    (got,) = torch.autograd.grad(logprobs.square().sum(), logits)
    (want,) = torch.autograd.grad(reference(logits, labels, 1.0)[0].square().sum(), logits)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_padded_vocabulary_takes_no_probability() -> None:
    logits, labels = inputs(vocab=20)
    padded = torch.cat((logits.detach(), torch.full((9, 4), 50.0).double()), 1).requires_grad_()
    logprobs, _ = token_logprobs(padded, labels, vocab_size=20)
    torch.testing.assert_close(logprobs, reference(logits, labels, 1.0)[0])
    (grad,) = torch.autograd.grad(logprobs.sum(), padded)
    assert torch.equal(grad[:, 20:], torch.zeros(9, 4).double())


def test_float32_inside_for_bfloat16() -> None:
    logits, labels = inputs(dtype=torch.bfloat16)
    logprobs, _ = token_logprobs(logits, labels)
    assert logprobs.dtype == torch.float32
    want = reference(logits, labels, 1.0)[0].float()
    torch.testing.assert_close(logprobs, want, rtol=1e-6, atol=1e-6)
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]), with_entropy=True)
    logprobs.sum().backward()
    assert logits.grad is not None and entropy is not None
    assert torch.isfinite(logprobs).all() and torch.isfinite(logits.grad).all()
    torch.testing.assert_close(entropy, torch.zeros(1))
