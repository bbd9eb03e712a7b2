"""The table of a preflight, for people: bad nodes one by one, all good ones in one line a check."""

from collections.abc import Sequence

from megatron_spear.cluster.preflight.judge import Judged
from megatron_spear.cluster.preflight.results import Check

_MAX_NAMES = 3
_MAX_VALUES = 2
_HEADER = ("", "node", "check", "found", "expected")


def render_table(nodes: Sequence[Judged]) -> str:
    """One line a check: ``BAD`` or ok, which nodes, what was found and what was expected."""
    good = [node for node in nodes if node.good]
    rows = [
        ("ok", _some([_name(node) for node in good], _MAX_NAMES, " "), *_together(checks))
        for checks in _by_name(good)
    ]
    rows += [
        ("ok" if check.good else "BAD", _name(node), check.name, check.found, check.expected)
        for node in nodes
        if not node.good
        for check in node.checks
    ]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (_HEADER, *rows)
    ]
    return "\n".join(lines)


def _by_name(nodes: Sequence[Judged]) -> list[list[Check]]:
    """The checks of one name of all nodes, in order."""
    checks: dict[str, list[Check]] = {}
    for node in nodes:
        for check in node.checks:
            checks.setdefault(check.name, []).append(check)
    return list(checks.values())


def _together(checks: Sequence[Check]) -> tuple[str, str, str]:
    """Name, what was found, what was expected."""
    found = list(dict.fromkeys(check.found for check in checks))
    return checks[0].name, _some(found, _MAX_VALUES, "; "), checks[0].expected


def _name(node: Judged) -> str:
    return node.name or f"number {node.index}"


def _some(words: Sequence[str], count: int, between: str) -> str:
    more = len(words) - count
    return between.join(words[:count]) + (f" and {more} more" if more > 0 else "")
