"""Starts the all-reduce of a preflight on one node, and reads what it found."""

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.cluster.commands import network_environment
from megatron_spear.cluster.preflight.results import Check, read_tree
from megatron_spear.cluster.processes import Child
from megatron_spear.config.cluster import ClusterSection

_LOOK_S = 0.1
_GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Bytes a second, and numbers of the nodes that hold the others up, if they are known.
    ``problem`` says why there is no figure."""

    bytes_per_s: float = 0.0
    slow: tuple[int, ...] = ()
    problem: str = ""


def run_probe(
    cluster: ClusterSection,
    index: int,
    master: tuple[str, int],
    output: Path,
    log: Path,
    limit_s: float,
) -> str:
    """Run this node's ranks of the probe within ``limit_s``; says what went wrong, or nothing."""
    line = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(cluster.trainer_nodes), "--node-rank", str(index)),
        *("--nproc-per-node", str(cluster.ranks_on_a_node), "--max-restarts", "0"),
        *("--master-addr", master[0], "--master-port", str(master[1])),
        *("-m", "megatron_spear.cluster.preflight.probe"),
        *("--backend", "nccl" if cluster.gpus_per_node else "gloo"),
        *("--floor", str(cluster.preflight.min_allreduce_bytes_per_s)),
        *("--timeout-s", f"{limit_s:g}", "--output", str(output)),
    ]
    environment = {**os.environ, **network_environment(cluster.network)}
    child = Child(line, environment, log)
    give_up = time.monotonic() + limit_s
    try:
        while child.status is None:
            if time.monotonic() > give_up:
                return f"the all-reduce did not end within {limit_s:g} s (its log: {log})"
            time.sleep(_LOOK_S)
        if child.status:
            return f"the all-reduce {child.fate}: {' | '.join(child.last_words(3))} ({log})"
        return ""
    finally:
        asyncio.run(child.end(_GRACE_S))


def read_measured(output: Path) -> Measured:
    """What rank 0 of the probe has written."""
    try:
        tree = read_tree(output.read_text(encoding="utf-8"))
        slow = tuple(int(node) for node in tree["slow"])
        return Measured(bytes_per_s=float(tree["bytes_per_s"]), slow=slow)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Measured(problem=f"the all-reduce left no figure: {error}")


def allreduce_check(measured: Measured, index: int, floor: float) -> Check:
    """The check of trainer node ``index``: bad if it holds the others up, or if nobody knows who
    does."""
    enough = not measured.problem and measured.bytes_per_s >= floor
    found = measured.problem or f"{measured.bytes_per_s / 1e9:.3g} GB/s"
    if measured.slow:
        nodes = ", ".join(map(str, measured.slow))
        found += f", held up by node number {nodes}"
    return Check(
        name="all-reduce",
        good=enough or (bool(measured.slow) and index not in measured.slow),
        found=found,
        expected=f"{floor / 1e9:.3g} GB/s or more",
    )
