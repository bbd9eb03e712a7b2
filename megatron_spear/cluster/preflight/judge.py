"""Node 0's judgement: what it takes several nodes to see, and who is bad."""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_spear.cluster.preflight.exchange import Heard
from megatron_spear.cluster.preflight.results import Check
from megatron_spear.config.cluster import PreflightSection


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One node and all its checks; ``name`` is None where nobody has told it."""

    index: int
    name: str | None
    checks: tuple[Check, ...]

    @property
    def good(self) -> bool:
        """Whether a run may start on it."""
        return all(check.good for check in self.checks)


def judge_nodes(
    nodes: Sequence[Heard], section: PreflightSection, names: Sequence[str] = ()
) -> list[Judged]:
    """All nodes by number; ``names`` are those of the job's nodes, in any order, if they are known.

    A node that told nothing is bad; it has the one name that is left, or as many as are.
    """
    clocks, versions = _clock_checks(nodes, section), _version_checks(nodes)
    heard_names = {heard.node for heard in nodes}
    left = [name for name in names if name not in heard_names]
    judged = []
    for index, heard in enumerate(nodes):
        name = heard.node
        if name is None and left and len(left) == sum(n.node is None for n in nodes):
            name = left[sum(n.node is None for n in nodes[:index])]
        answered = Check(
            name="answer by shared files",
            good=not heard.silence,
            found=heard.silence or "yes",
            expected=f"within {section.deadline_s:g} s",
        )
        own = heard.result.checks if heard.result is not None else ()
        across = [*clocks.get(index, ()), *versions.get(index, ())]
        judged.append(Judged(index=index, name=name, checks=(answered, *own, *across)))
    return judged


def _clock_checks(
    nodes: Sequence[Heard], section: PreflightSection
) -> Mapping[int, tuple[Check, ...]]:
    """Each clock against the middle one of all; of two, the one that is behind counts as that."""
    clocks = {i: heard.clock for i, heard in enumerate(nodes) if heard.clock is not None}
    if not clocks:
        return {}
    middle = statistics.median_low(clock.middle for clock in clocks.values())
    limit = section.max_clock_skew_s
    checks = {}
    for index, clock in clocks.items():
        ahead = clock.middle - middle
        sure = max(0.0, abs(ahead) - clock.accuracy)
        checks[index] = (
            Check(
                name="clock",
                good=sure <= limit and clock.accuracy <= limit,
                found=f"{ahead:+.2f} s, to {clock.accuracy:.2f} s",
                expected=f"{limit:g} s at most",
            ),
        )
    return checks


def _version_checks(nodes: Sequence[Heard]) -> Mapping[int, tuple[Check, ...]]:
    """Each node's versions against the most frequent ones; node 0's where two are as frequent."""
    told = {i: heard.result.versions for i, heard in enumerate(nodes) if heard.result is not None}
    usual: dict[str, str] = {}
    for package in dict.fromkeys(name for versions in told.values() for name in versions):
        counts = Counter(versions.get(package, "-") for versions in told.values())
        usual[package] = counts.most_common(1)[0][0]
    checks = {}
    for index, versions in told.items():
        other = {p: versions.get(p, "-") for p in usual if versions.get(p, "-") != usual[p]}
        checks[index] = (
            Check(
                name="versions",
                good=not other,
                found=_listed(other) or "as on the others",
                expected=_listed({p: usual[p] for p in other}) or "as on the others",
            ),
        )
    return checks


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def expand_names(nodelist: str) -> list[str]:
    """The nodes of a Slurm list, as ``SLURM_JOB_NODELIST`` is one.

    Example: ``n[1,08-10],m`` are n1, n08, n09, n10 and m.
    """
    return [
        name for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist) for name in _item(item)
    ]


def _item(item: str) -> list[str]:
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    ranges, _, after = rest.partition("]")
    names = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names += [f"{before}{number:0{len(first)}d}{tail}" for tail in _item(after)]
    return names
