"""Processes of a node: started so that they end with us, and ended with all that they started.

    supervisor --+-- torchrun --+-- rank 0 -- environment workers     each child is a session of its
                 |              +-- rank 1                            own; ranks are sessions again
                 +-- engine server -- its own processes

A process that dies tells its children by a signal (``PR_SET_PDEATHSIG``), and the supervisor adopts
what its children leave behind (``PR_SET_CHILD_SUBREAPER``). Should the supervisor be killed all the
same, the next one on the node finds what is left by the files that ``note`` writes. Linux only.
"""

import asyncio
import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.files import write_whole

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.1
_KILL_S = 30.0
"""Longest wait for what was killed; a process that waits for a device or a disk may stay longer."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TORCHRUN_FAILED = re.compile(r"E\d.*torch/distributed/elastic/.* failed ")
_TORCHRUN_WARNS = re.compile(r"W\d.*torch/distributed/elastic/")
_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process ``number`` when its parent dies; at once if it has died
    already: its parent is not ``parent`` any more, or where that is not known, the init process."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    now = os.getppid()
    if now == 1 if parent is None else now != parent:
        os.kill(os.getpid(), number)


@contextmanager
def adopting_orphans() -> Iterator["Offspring"]:
    """For the length of the block we are the parent of processes whose own parent, one of our
    descendants, dies. Gives all that is started within it."""
    offspring = Offspring()
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield offspring
    finally:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of the process table; ``started`` in clock ticks since boot tells it from a later
    process of the same pid."""

    pid: int
    parent: int
    session: int
    started: int
    is_zombie: bool


def process_table() -> dict[int, Entry]:
    """All processes of the machine, by pid."""
    found = (_entry(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {entry.pid: entry for entry in found if entry is not None}


def _entry(pid: int) -> Entry | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in brackets may hold anything, brackets too; what follows is state, parent, ...
    fields = text.rpartition(")")[2].split()
    return Entry(
        pid=pid,
        parent=int(fields[1]),
        session=int(fields[3]),
        started=int(fields[19]),
        is_zombie=fields[0] in "ZX",
    )


def descendants(pids: Iterable[int], table: Mapping[int, Entry]) -> set[int]:
    """Children of these processes, their children, and so on."""
    children: dict[int, list[int]] = {}
    for entry in table.values():
        children.setdefault(entry.parent, []).append(entry.pid)
    found: set[int] = set()
    todo = list(pids)
    while todo:
        new = [pid for pid in children.get(todo.pop(), ()) if pid not in found]
        found.update(new)
        todo += new
    return found


def children_of(pid: int) -> list[int]:
    """Live children of a process."""
    table = process_table().values()
    return [entry.pid for entry in table if entry.parent == pid and not entry.is_zombie]


class Child:
    """A process in a session of its own, with its output in ``log`` (appended).

    It ignores SIGUSR1 until it installs a handler, as all that it starts does: a request to stop
    may come before its handlers are there. SIGTERM ends it though we may ignore it ourselves.
    ``dies_by`` is what it gets when we die.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        dies_by: signal.Signals = signal.SIGKILL,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)

        own = os.getpid()

        def prepare() -> None:
            end_with_parent(dies_by, own)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        self.log = log
        self._log_begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=prepare,
            )
        self.pid = self._process.pid
        _own.add(self.pid)
        entry = _entry(self.pid)  # a zombie at the least: nobody has waited for it yet
        assert entry is not None
        self._started = entry.started

    @property
    def status(self) -> int | None:
        """Exit status (negative: the signal that ended it), None while it runs."""
        return self._process.poll()

    @property
    def fate(self) -> str:
        """How it ended, in words."""
        status = self._process.poll()
        if status is None:
            return "still runs"
        return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"

    def note(self, file: Path) -> None:
        """Write down which process this is, for ``end_noted`` of a later launch."""
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {"pid": self.pid, "started": self._started, "boot": _boot()}
        write_whole(file, json.dumps(record) + "\n")

    def last_words(self, num_lines: int = 20) -> list[str]:
        """The last lines of its log; of torchrun's account the one with the first failure."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_begin, size - (64 << 10)))
            lines = file.read().decode("utf-8", "replace").splitlines()
        failure = next((i for i, line in enumerate(lines) if _TORCHRUN_FAILED.match(line)), None)
        if failure is not None:
            lines = lines[: failure + 1]
        return [x for x in lines if x.strip() and not _TORCHRUN_WARNS.match(x)][-num_lines:]

    async def wait(self) -> int:
        """Its exit status, once it has ended."""
        while (status := self.status) is None:
            await asyncio.sleep(2 * _LOOK_S)
        return status

    async def end(self, grace_s: float) -> None:
        """End it and all that it started: SIGTERM to it and its session, SIGKILL ``grace_s`` later
        to whatever is left."""
        await _end_trees({self.pid: self._started}, grace_s)
        self.status  # noqa: B018  (takes the exit status, so that no zombie stays)
        _own.discard(self.pid)


_own: set[int] = set()
"""Pids of ``Child``s, whose exit status belongs to them."""


async def _end_trees(leaders: Mapping[int, int], grace_s: float) -> None:
    """End processes, given by pid and start, with their sessions and descendants."""
    known: set[tuple[int, int]] = set()
    told: set[int] = set()
    began = time.monotonic()
    while True:
        table = process_table()
        # A pid is not given to another process while a session is named by it.
        reused = {p for p, start in leaders.items() if p in table and table[p].started != start}
        lead = leaders.keys() - reused
        members = {p for p, entry in table.items() if p in lead or entry.session in lead}
        known |= {(p, table[p].started) for p in members | descendants(members, table)}
        there = {p for p, start in known if p in table and table[p].started == start}
        _reap(there, table)
        alive = {p for p in there if not table[p].is_zombie}
        if not alive:
            return
        late_s = time.monotonic() - began - grace_s
        if late_s > _KILL_S:
            log.warning("processes %s do not end, not even by SIGKILL", sorted(alive))
            return
        if late_s >= 0.0:
            _signal(alive, signal.SIGKILL)
        else:
            # Those further down are told by their parents, in the right order, while there are any.
            heads = (alive & lead or alive & members or alive) - told
            _signal(heads, signal.SIGTERM)
            told |= heads
        await asyncio.sleep(_LOOK_S)


class Offspring:
    """All that this process starts from now on, directly or not. Children that it had before, such
    as the fork server of a library, are left alone."""

    def __init__(self) -> None:
        table = process_table()
        self._before = {(e.pid, e.started) for e in table.values() if e.parent == os.getpid()}

    async def end(self, grace_s: float) -> None:
        """End everything of it that runs."""
        for patience_s in (grace_s, 0.0):  # what was adopted meanwhile gets no time of its own
            await _end_trees(
                {e.pid: e.started for e in self._children(process_table())}, patience_s
            )

    def reap(self) -> None:
        """Take the exit status of what was adopted and has ended."""
        table = process_table()
        _reap([entry.pid for entry in self._children(table)], table)

    def _children(self, table: Mapping[int, Entry]) -> list[Entry]:
        own = [entry for entry in table.values() if entry.parent == os.getpid()]
        return [entry for entry in own if (entry.pid, entry.started) not in self._before]


def _reap(pids: Iterable[int], table: Mapping[int, Entry]) -> None:
    """Of these, zombies of ours that are no ``Child``."""
    own = os.getpid()
    for pid in pids:
        if table[pid].is_zombie and table[pid].parent == own and pid not in _own:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


async def end_noted(files: Iterable[Path], grace_s: float) -> list[int]:
    """End what an earlier launch noted and left running on this machine; gives the pids found.

    A file of another boot, or whose process has ended with all of its session, costs nothing; a pid
    that now belongs to another process is left alone.
    """
    table, found = process_table(), dict[int, int]()
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            pid, started, boot = int(record["pid"]), int(record["started"]), str(record["boot"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        members = [e for e in table.values() if e.session == pid and not e.is_zombie]
        reused = pid in table and table[pid].started != started
        if boot == _boot() and members and not reused and pid not in _own:
            found[pid] = started
    await _end_trees(found, grace_s)
    return list(found)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _boot() -> str:
    try:
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
