"""The controller's messages to the other ranks."""

from megatron_spear.testing.ranks import run_ranks
from megatron_spear.trainer.ranks import all_true, broadcast


def _on_two_ranks() -> tuple[object, bool, bool, bool]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    got = broadcast({"rank": rank, "text": "a" * (3 + 100 * rank)})
    answers = (all_true(True), all_true(rank == 0), all_true(False))
    dist.destroy_process_group()
    return got, *answers


def test_alone_values_come_back_as_they_are() -> None:
    value = [1, 2]
    assert broadcast(value) is value
    assert all_true(True) and not all_true(False)


def test_two_ranks_hear_rank_0_and_agree_only_together() -> None:
    expected = ({"rank": 0, "text": "aaa"}, True, False, False)
    assert run_ranks(_on_two_ranks, 2) == [expected, expected]
