"""Node 0's judgement: clocks, versions, silence, names; the table."""

import pytest

from megatron_spear.cluster.preflight.exchange import ClockOffset, Heard
from megatron_spear.cluster.preflight.judge import expand_names, judge_nodes
from megatron_spear.cluster.preflight.results import Check, NodeResult
from megatron_spear.cluster.preflight.table import render_table
from megatron_spear.config.cluster import PreflightSection

SECTION = PreflightSection(max_clock_skew_s=10.0)
GOOD = Check(name="free /dev/shm", good=True, found="2.0 GiB", expected="1.0 GiB or more")


def _node(index, *, ahead=0.0, accuracy=0.1, versions=None, checks=(GOOD,)):
    heard = Heard()
    heard.node = f"n{index}"
    heard.clock = ClockOffset(low=ahead - accuracy, high=ahead + accuracy)
    heard.result = NodeResult(
        node=heard.node, index=index, checks=checks, versions=versions or {"torch": "2.13.0"}
    )
    return heard


def _bad(nodes, names=()):
    """What is bad by node number."""
    judged = judge_nodes(nodes, SECTION, names)
    found = {n.index: [(c.name, c.found) for c in n.checks if not c.good] for n in judged}
    return {index: checks for index, checks in found.items() if checks}


def test_good_nodes_are_good():
    assert not _bad([_node(0), _node(1, ahead=9.0), _node(2, ahead=-9.0)])


def test_a_clock_that_is_off_is_found_also_if_it_is_node_0s():
    assert _bad([_node(0), _node(1), _node(2, ahead=30.0)]) == {
        2: [("clock", "+30.00 s, to 0.10 s")]
    }
    # As node 0 sees it, both others are ahead.
    assert list(_bad([_node(0), _node(1, ahead=30.0), _node(2, ahead=30.1)])) == [0]
    assert list(_bad([_node(0), _node(1, ahead=15.0)])) == [1]


def test_a_clock_is_bad_only_for_sure_or_where_nothing_can_be_said():
    assert not _bad([_node(0), _node(1, ahead=12.0, accuracy=3.0)])
    assert list(_bad([_node(0), _node(1, ahead=12.0, accuracy=1.9)])) == [1]
    assert _bad([_node(0), _node(1, accuracy=11.0)]) == {1: [("clock", "+0.00 s, to 11.00 s")]}


def test_a_node_with_other_versions_is_found():
    usual = {"torch": "2.13.0", "numpy": "2.1"}
    other = {"torch": "2.12.1", "numpy": "2.1"}
    nodes = [_node(0, versions=other), _node(1, versions=usual), _node(2, versions=usual)]
    assert _bad(nodes) == {0: [("versions", "torch 2.12.1")]}
    # Of two alternatives that are as frequent, node 0's counts.
    assert _bad(nodes[:2]) == {1: [("versions", "torch 2.13.0")]}
    lacking = _node(2, versions={"torch": "2.13.0"})
    assert _bad([nodes[1], lacking, nodes[1]]) == {1: [("versions", "numpy -")]}


def test_silence_is_bad_and_says_how_far_a_node_came():
    silent, stuck, unfinished = Heard(), Heard(), _node(3)
    stuck.node = "n2"
    unfinished.result = None
    bad = _bad([_node(0), silent, stuck, unfinished])
    assert {index: checks[0][1] for index, checks in bad.items()} == {
        1: "it did not start, or node 0 does not see its file",
        2: "it started, but did not answer node 0's file",
        3: "its checks did not end",
    }


def test_a_silent_node_has_the_name_that_is_left():
    def names(known, nodes):
        return [node.name for node in judge_nodes(nodes, SECTION, known)]

    nodes = [_node(0), Heard(), _node(2)]
    assert names([], nodes) == ["n0", None, "n2"]
    assert names(["n2", "n1", "n0"], nodes) == ["n0", "n1", "n2"]
    assert names(["n0", "n2", "n7", "n8"], nodes) == ["n0", None, "n2"], "one of two"
    assert names(["n0", "n7", "n8"], [_node(0), Heard(), Heard()]) == ["n0", "n7", "n8"]


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n1,m", ["n1", "m"]),
        ("n[1,08-10],m", ["n1", "n08", "n09", "n10", "m"]),
        ("a[1-2]b[3-4]-x", ["a1b3-x", "a1b4-x", "a2b3-x", "a2b4-x"]),
        ("gpu-a[001-002],gpu-b7", ["gpu-a001", "gpu-a002", "gpu-b7"]),
    ],
)
def test_a_list_of_slurm_is_expanded(nodelist, names):
    assert expand_names(nodelist) == names


def test_the_table_tells_bad_nodes_apart_and_good_ones_together():
    full = Check(name="free /dev/shm", good=False, found="0.1 GiB", expected="1.0 GiB or more")
    nodes = [_node(i, ahead=i) for i in range(5)] + [_node(5, checks=(full,))]
    header, *lines = render_table(judge_nodes(nodes, SECTION)).splitlines()
    assert header.split() == ["node", "check", "found", "expected"]
    good, bad = lines[:4], lines[4:]
    assert all(line.startswith("ok   n0 n1 n2 and 2 more  ") for line in good)
    assert "-1.00 s, to 0.10 s; +0.00 s, to 0.10 s and 3 more" in good[2]
    assert [line.split()[:2] for line in bad] == [[w, "n5"] for w in ("ok", "BAD", "ok", "ok")]
    assert "0.1 GiB" in bad[1] and bad[1].endswith("1.0 GiB or more")


def test_a_table_without_good_nodes_has_bad_ones():
    assert "number 0  answer by shared files" in render_table(judge_nodes([Heard()], SECTION))
