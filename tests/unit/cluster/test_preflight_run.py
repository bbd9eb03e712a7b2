"""A preflight of three nodes, each in a thread of its own, with clocks and rooms made up."""

import json
import threading
import time

import pytest
from smi_outputs import healthy, row_line, smi_of

from megatron_spear.cluster.attempt import Attempt, bad_nodes
from megatron_spear.cluster.keepers import Node
from megatron_spear.cluster.preflight.node import Facts
from megatron_spear.cluster.preflight.run import Preflight
from megatron_spear.config.cluster import ClusterSection, PreflightSection

GIB = 1 << 30


def _facts(**other):
    plenty = {"free_bytes": lambda path: 10 * GIB, "versions": lambda: {"torch": "2.13.0"}}
    return Facts(**{**plenty, **other})


class Job:
    """Three nodes of an attempt; ``facts`` by number, without an entry good ones."""

    def __init__(self, folder, deadline_s=2.0, gpus_per_node=0):
        self.attempt = Attempt.begin(folder)
        self.cluster = ClusterSection(
            trainer_nodes=3,
            gpus_per_node=gpus_per_node,
            preflight=PreflightSection(deadline_s=deadline_s, max_clock_skew_s=5.0),
        )
        self.said = ""

    def run(self, facts=None, *, starts=(0, 1, 2), names=(), attempts=None):
        """The exit status of each node that starts."""
        statuses = {}

        def say(text):
            self.said += text + "\n"

        def node(index):
            statuses[index] = Preflight(
                cluster=self.cluster,
                attempt=(attempts or {}).get(index, self.attempt),
                node=Node(index=index, name=f"n{index}", address="127.0.0.1"),
                names=names,
                say=say,
                facts=(facts or {}).get(index, _facts()),
            ).run()

        threads = [threading.Thread(target=node, args=(index,)) for index in starts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert sorted(statuses) == sorted(starts), "every node ends"
        return statuses

    @property
    def bad(self):
        return bad_nodes(self.attempt.run)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_good_nodes_are_good_and_at_once(job):
    began = time.monotonic()
    assert job.run() == {0: 0, 1: 0, 2: 0}
    assert time.monotonic() - began < 1.5
    assert job.bad == []
    assert "3 node(s) are good" in job.said
    assert "BAD" not in job.said
    result = json.loads((job.attempt.path / "preflight" / "n2.json").read_text())
    assert (result["index"], result["versions"]) == (2, {"torch": "2.13.0"})
    assert [check["name"] for check in result["checks"]] == [
        "free /dev/shm",
        "free disk of the run",
    ]


def test_a_bad_node_is_named_and_all_end_with_3(job):
    assert job.run({1: _facts(free_bytes=lambda path: GIB // 2)}) == {0: 3, 1: 3, 2: 3}
    assert job.bad == ["n1"]
    assert "1 bad node(s); n1: jobs leave them out from now on" in job.said


def test_names_of_bad_nodes_are_kept_once(job):
    (job.attempt.run / "bad_nodes").write_text("n7\nn1\n")
    job.run({1: _facts(free_bytes=lambda path: 0), 2: _facts(free_bytes=lambda path: 0)})
    assert job.bad == ["n7", "n1", "n2"]


def test_a_clock_that_is_off_is_found(job):
    assert job.run({2: _facts(now=lambda: time.time() + 30.0)}) == {0: 3, 1: 3, 2: 3}
    assert job.bad == ["n2"]
    (line,) = (line for line in job.said.splitlines() if line.startswith("BAD"))
    assert "clock" in line
    ahead = float(line.split("+")[1].split()[0])
    assert abs(ahead - 30.0) < 0.5


def test_the_clock_of_node_0_may_be_the_one(job):
    job.run({0: _facts(now=lambda: time.time() - 3600.0)})
    assert job.bad == ["n0"]


def test_a_slow_check_is_a_bad_node(tmp_path):
    job = Job(tmp_path, deadline_s=5.0)  # of which a second is left to tell it
    assert job.run({1: _facts(free_bytes=lambda path: time.sleep(9))}) == {0: 3, 1: 3, 2: 3}
    assert job.bad == ["n1"]
    assert "no answer within" in job.said


def test_a_silent_node_is_bad_and_named_where_it_can_be(job, tmp_path):
    assert job.run(starts=(0, 1)) == {0: 3, 1: 3}
    assert job.bad == []
    assert "the name of number 2 is not known" in job.said
    again = Job(tmp_path)
    assert again.run(starts=(0, 1), names=["n0", "n1", "n2"]) == {0: 3, 1: 3}
    assert again.bad == ["n2"]


def test_a_node_that_sees_other_files_is_bad_on_both_sides(tmp_path):
    job = Job(tmp_path, deadline_s=6.0)  # room for the others on a busy machine
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Attempt.begin(tmp_path / "elsewhere")
    statuses = job.run(attempts={2: elsewhere}, names=["n0", "n1", "n2"])
    assert statuses == {0: 3, 1: 3, 2: 3}
    assert job.bad == ["n2"]
    assert "node 0 did not answer through shared files within 6 s" in job.said


def test_without_node_0_the_others_end_in_time(job):
    assert job.run(starts=(1, 2)) == {1: 3, 2: 3}


def test_files_of_an_earlier_preflight_do_not_count(job):
    assert job.run() == {0: 0, 1: 0, 2: 0}
    assert job.run(starts=(0, 1), names=["n0", "n1", "n2"]) == {0: 3, 1: 3}
    assert job.bad == ["n2"]
    assert job.run() == {0: 0, 1: 0, 2: 0}


def test_half_written_files_are_read_later(job):
    folder = job.attempt.path / "preflight"
    folder.mkdir()
    for name in ("hello_1", "call_1", "answer_1", "n1", "verdict", "measure"):
        (folder / f"{name}.json").write_text('{"token": "')
    assert job.run() == {0: 0, 1: 0, 2: 0}


def test_gpus_are_part_of_it(tmp_path):
    job = Job(tmp_path, gpus_per_node=2)
    good = _facts(smi=smi_of(healthy(2)), visible=None)
    worn = _facts(smi=smi_of(healthy(2), [row_line(1, pending=1)]), visible=None)
    assert job.run({0: good, 1: worn, 2: good}) == {0: 3, 1: 3, 2: 3}
    assert job.bad == ["n1"]
    assert "GPU 1: row remapping pending" in job.said
