"""The preflight of a job: each node looks at itself, node 0 at all of them, before a run starts."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.background import in_background
from megatron_spear.cluster.attempt import BAD_NODES_NAME, Attempt, bad_nodes
from megatron_spear.cluster.keepers import Node
from megatron_spear.cluster.kept import free_port
from megatron_spear.cluster.preflight.allreduce import (
    Measured,
    allreduce_check,
    read_measured,
    run_probe,
)
from megatron_spear.cluster.preflight.exchange import Board, Collector, NodeEnd, wait_for
from megatron_spear.cluster.preflight.judge import Judged, judge_nodes
from megatron_spear.cluster.preflight.node import Facts, look_at_node
from megatron_spear.cluster.preflight.table import render_table
from megatron_spear.cluster.restarts import BAD_NODES_STATUS
from megatron_spear.config.cluster import ClusterSection
from megatron_spear.files import write_whole

_OWN_SHARE = 0.8  # of the time left, so that a check that hangs is told as such
_SLACK_S = 10.0  # for node 0's words after its own deadline, and for ranks to be ended


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """One node's part in the preflight of an attempt; ``run`` gives the exit status.

    ``names`` are those of all nodes of the job, where they are known: they name nodes that are
    silent. ``say`` takes text for the user.
    """

    cluster: ClusterSection
    attempt: Attempt
    node: Node
    names: Sequence[str]
    say: Callable[[str], None]
    facts: Facts

    @property
    def limit_s(self) -> float:
        """Longest time the whole of it may take."""
        return 2 * self.cluster.preflight.deadline_s + 3 * _SLACK_S

    def run(self) -> int:
        """0: all nodes are good. 3 (``BAD_NODES_STATUS``): some are not; node 0 says which."""
        board = Board(self.attempt.path / "preflight")
        deadline = time.monotonic() + self.cluster.preflight.deadline_s
        lead = None
        if self.node.index == 0:
            collector = Collector(board, self.cluster.num_nodes, self.facts.now)
            lead = in_background(lambda: self._lead(collector, deadline), "preflight")
        status = self._follow(board, deadline)
        return lead.result() if lead is not None else status

    def _follow(self, board: Board, deadline: float) -> int:
        """Every node's part: answer, look, measure with the others, hear the verdict."""
        node, limit_s = self.node, self.cluster.preflight.deadline_s
        end = NodeEnd(board, node.name, node.index, self.facts.now)
        if not end.answer(deadline):
            self.say(f"node 0 did not answer through shared files within {limit_s:g} s")
            return BAD_NODES_STATUS
        left_s = _OWN_SHARE * max(deadline - time.monotonic(), 0.0)
        run = self.attempt.run
        end.tell(look_at_node(self.cluster, run, node.name, node.index, self.facts, left_s))
        deadline += _SLACK_S
        said = wait_for(lambda: end.heard("verdict") or end.heard("measure") or None, deadline)
        if said is not None and "port" in said:
            if node.index < self.cluster.trainer_nodes:
                log = self.attempt.log(node.name, "preflight", node.index)
                problem = run_probe(
                    self.cluster,
                    node.index,
                    (said["host"], said["port"]),
                    board.path(said["output"]),
                    log,
                    limit_s,
                )
                end.write("measured", {"problem": problem})
            deadline = time.monotonic() + limit_s + 2 * _SLACK_S
            said = wait_for(lambda: end.heard("verdict") or None, deadline)
        if said is None:
            self.say("node 0 has given no verdict")
            return BAD_NODES_STATUS
        return int(said["status"])

    def _lead(self, collector: Collector, deadline: float) -> int:
        """Node 0's part: hear all nodes, measure, tell, note bad nodes, give the verdict."""
        cluster, section = self.cluster, self.cluster.preflight
        collector.collect(deadline)
        nodes = judge_nodes(collector.nodes, section, self.names)
        blamed = [node for node in nodes if not node.good]
        if section.min_allreduce_bytes_per_s and cluster.world_size > 1 and not blamed:
            measured = self._measure(collector)
            nodes = [self._with_allreduce(node, measured) for node in nodes]
            blamed = [node for node in nodes if node.index in measured.slow]
        self.say(render_table(nodes))
        status = 0 if all(node.good for node in nodes) else BAD_NODES_STATUS
        self._note(blamed, status)
        collector.say("verdict", {"status": status})
        return status

    def _measure(self, collector: Collector) -> Measured:
        trainers, limit_s = self.cluster.trainer_nodes, self.cluster.preflight.deadline_s
        output = f"allreduce_{time.time_ns()}"
        meeting = {"host": self.node.address, "port": free_port(), "output": output}
        collector.say("measure", meeting)

        def told() -> list[str] | None:
            found = [collector.hear("measured", index).get("problem") for index in range(trainers)]
            problems = [problem for problem in found if problem is not None]
            silent[:] = [index for index, problem in enumerate(found) if problem is None]
            return None if silent else problems

        silent: list[int] = []
        problems = wait_for(told, time.monotonic() + limit_s + _SLACK_S)
        if problems is None:
            return Measured(slow=tuple(silent), problem="the all-reduce did not end")
        if any(problems):
            return Measured(problem=next(filter(None, problems)))
        return read_measured(self.attempt.path / "preflight" / f"{output}.json")

    def _with_allreduce(self, node: Judged, measured: Measured) -> Judged:
        if node.index >= self.cluster.trainer_nodes:
            return node
        floor = self.cluster.preflight.min_allreduce_bytes_per_s
        check = allreduce_check(measured, node.index, floor)
        return dataclasses.replace(node, checks=(*node.checks, check))

    def _note(self, blamed: Sequence[Judged], status: int) -> None:
        """Have jobs leave out the blamed nodes from now on; say how the preflight ended."""
        if not status:
            self.say(f"preflight: {self.cluster.num_nodes} node(s) are good")
            return
        named = [node.name for node in blamed if node.name is not None]
        file = self.attempt.run / BAD_NODES_NAME
        if named:
            noted = dict.fromkeys([*bad_nodes(self.attempt.run), *named])
            write_whole(file, "".join(f"{name}\n" for name in noted))
        self.say(f"preflight: {_summary(blamed, named, file)}")


def _summary(blamed: Sequence[Judged], named: Sequence[str], file: Path) -> str:
    if not blamed:
        return "the nodes together are too slow, and none of them alone is; none is left out"
    text = f"{len(blamed)} bad node(s)"
    if named:
        text += f"; {' '.join(named)}: jobs leave them out from now on ({file})"
    nameless = [str(node.index) for node in blamed if node.name is None]
    if nameless:
        text += f"; the name of number {', '.join(nameless)} is not known, so it is not left out"
    return text
