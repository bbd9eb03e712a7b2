"""The all-reduce of a preflight: figures, who is slow, what is said where nobody knows."""

import pytest

from megatron_spear.cluster.preflight.allreduce import Measured, allreduce_check, read_measured
from megatron_spear.cluster.preflight.probe import ring_rounds, slow_nodes


@pytest.mark.parametrize("num_nodes", range(1, 9))
def test_rounds_have_each_neighbourhood_once_and_no_node_twice(num_nodes):
    rounds = ring_rounds(num_nodes)
    for in_round in rounds:
        nodes = [node for pair in in_round for node in pair]
        assert len(nodes) == len(set(nodes))
    pairs = [frozenset(pair) for in_round in rounds for pair in in_round]
    expected = num_nodes if num_nodes > 2 else 0
    assert len(pairs) == len(set(pairs)) == expected
    if expected:
        assert all(sum(node in pair for pair in pairs) == 2 for node in range(num_nodes))


def test_a_node_is_slow_if_both_its_pairs_are():
    rates = {(0, 1): 9.0, (1, 2): 1.0, (2, 3): 2.0, (3, 0): 9.0}
    assert slow_nodes(4, rates, 5.0) == [2]
    assert slow_nodes(2, {}, 5.0) == []
    assert slow_nodes(4, rates, 10.0) == [], "all of them: the network, or the floor"


def test_the_check_says_whom_it_blames():
    assert allreduce_check(Measured(bytes_per_s=5e9), 0, 4e9).good
    slow = Measured(bytes_per_s=1e9, slow=(1,))
    assert [allreduce_check(slow, index, 4e9).good for index in range(3)] == [True, False, True]
    assert allreduce_check(slow, 0, 4e9).found == "1 GB/s, held up by node number 1"
    unknown = Measured(bytes_per_s=1e9)
    assert [allreduce_check(unknown, index, 4e9).good for index in range(2)] == [False, False]
    assert not allreduce_check(Measured(problem="it hangs"), 0, 4e9).good


def test_what_rank_0_wrote_is_read(tmp_path):
    file = tmp_path / "found.json"
    assert "left no figure" in read_measured(file).problem
    file.write_text("[]")
    assert "left no figure" in read_measured(file).problem
    file.write_text('{"bytes_per_s": 2.5, "slow": [1]}')
    assert read_measured(file) == Measured(bytes_per_s=2.5, slow=(1,))
