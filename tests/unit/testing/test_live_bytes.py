"""Live bytes of tensors: what lives at once, what is given back, what is left."""

import torch

from megatron_spear.algorithms.logprobs import SCRATCH_BYTES
from megatron_spear.cluster.planner.activations import LOGPROBS_SCRATCH_BYTES
from megatron_spear.testing.live_bytes import live_bytes


def test_what_lives_at_once() -> None:
    before = torch.zeros(1000)
    with live_bytes() as found:
        first = torch.zeros(1000)
        second = first[:10]  # a view is no memory of its own
        third = torch.zeros(500)
        del third
        fourth = torch.zeros(250)
        del before
    assert found.peak == 4 * 1500
    assert found.left == 4 * 1250
    del first, second, fourth


def test_what_a_backward_pass_holds() -> None:
    weight = torch.nn.Parameter(torch.zeros(300, 200))
    with live_bytes() as found:
        loss = (torch.zeros(100, 300) @ weight).relu().sum()
        loss.backward()
    assert weight.grad is not None
    inputs, outputs, gradient = 4 * 100 * 300, 4 * 100 * 200, 4 * 300 * 200
    assert inputs + outputs + gradient <= found.peak <= inputs + 3 * outputs + gradient + 4096
    assert gradient <= found.left <= gradient + 4096


def test_the_planner_knows_the_pieces_of_the_log_probs() -> None:
    assert LOGPROBS_SCRATCH_BYTES == 2 * SCRATCH_BYTES
