"""The table of a preflight, for people: bad nodes one by one, good ones alike in one line."""

from collections.abc import Sequence

from megatron_spear.cluster.preflight.judge import Judged

_MAX_NAMES = 3
_HEADER = ("", "node", "check", "found", "expected")


def render_table(nodes: Sequence[Judged]) -> str:
    """One line a check: ``BAD`` or ok, which nodes, what was found and what was expected."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for node in nodes:
        name = node.name or f"number {node.index}"
        for check in node.checks:
            # A node with something bad is told whole, so that all of it stands together.
            alone = "" if node.good else name
            mark = "ok" if check.good else "BAD"
            alike.setdefault((alone, mark, check.name, check.found, check.expected), []).append(
                name
            )
    rows = [
        (mark, _names(names), name, found, expected)
        for (_, mark, name, found, expected), names in alike.items()
    ]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (_HEADER, *rows)
    ]
    return "\n".join(lines)


def _names(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return " ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
