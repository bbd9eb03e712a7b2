"""Clocks jump: nothing that waits or measures may look at the wall clock."""

import ast
from pathlib import Path

import megatron_spear

PACKAGE = Path(megatron_spear.__file__).parent
WALL = {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime"}
OF_TODAY = {"now", "utcnow", "today", "fromtimestamp"}
OF_FILES = {"st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "getmtime", "getctime"}

MAY = {
    "tracking/jsonl.py": {"time"},  # when a record was written, for people
    "cli/launch_local.py": {"strftime"},  # the same, of a line on the screen
    "conversion/convert.py": {"st_mtime_ns"},  # whether a file is still the same one
    "cluster/supervisor.py": {"st_mtime_ns"},  # the same
    "report/keeping.py": {"st_mtime_ns"},  # the same
    "report/write.py": {"time"},  # when the page was written, for people
    "cluster/preflight/node.py": {"time"},  # the very thing it checks: whether clocks agree
    "cluster/preflight/run.py": {"time_ns"},  # a name that no earlier check had
}
"""Who uses which wall clock, and for what; no deadline and no duration is among it."""


def wall_clocks(tree: ast.AST) -> set[str]:
    """Names of wall clocks that code uses: ``time.time``, ``datetime.now``, times of files."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found |= WALL & {name.name for name in node.names}
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if (owner == "time" and node.attr in WALL) or node.attr in OF_FILES:
            found.add(node.attr)
        if owner in ("datetime", "date") and node.attr in OF_TODAY:
            found.add(node.attr)
    return found


def test_wall_clocks_are_for_people_only() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        used = wall_clocks(ast.parse(path.read_text(encoding="utf-8")))
        if used and not name.startswith("testing/"):
            found[name] = used
    assert found == MAY, "use time.monotonic, or say here what the wall clock is for"


def test_they_are_seen_in_every_spelling() -> None:
    for code, name in (
        ("import time\ntime.time()", "time"),
        ("from time import time", "time"),
        ("datetime.now()", "now"),
        ("path.stat().st_mtime", "st_mtime"),
        ("os.path.getmtime(path)", "getmtime"),
    ):
        assert wall_clocks(ast.parse(code)) == {name}, code
    assert wall_clocks(ast.parse("import time\ntime.monotonic(); time.perf_counter()")) == set()
