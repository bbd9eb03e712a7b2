"""The heartbeat file of each trainer rank: what it does, and for how long it has not moved.

    HEARTBEATS/rank_3.json    {"launch": "...", "rank": 3, "beats": 17, "moves": 1234, ...}
    HEARTBEATS/hang.json      the first rank whose watchdog has expired

A file is written in place, padded to a fixed size: no new name, no rename, no flush to disk, and
room that a full disk cannot take away. A reader that meets half of a write reads again. Whether a
rank is alive is told by ``beats`` changing from one look to the next; durations are each rank's own
and monotonic. No clock of one machine is ever compared with that of another.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_SIZE = 2048
_MAX_TEXT = 150
HANG_FILE = "hang.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What one rank last wrote.

    ``beats`` counts the writes, ``moves`` what the rank has done; ``still_s`` is how long ago, at
    the time of the write, the last of these was. ``doing`` is its task, ``at`` the line it is at,
    ``waits_in`` the collective it is in (empty: none). ``ended`` says how it ended, or is empty.

    Example: rank 1 is in the optimizer's all-reduce of step 3: ``doing`` "step 3: train", ``at``
    "clip_grads.py:87 in get_grad_norm", ``waits_in`` "all_reduce".
    """

    rank: int
    host: str
    pid: int
    beats: int
    moves: int
    still_s: float
    doing: str
    at: str = ""
    waits_in: str = ""
    ended: str = ""

    @property
    def name(self) -> str:
        """``rank 1 on n2 (pid 4711)``."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def where(self) -> str:
        """What it does and where, in words."""
        waits = f"waits in {self.waits_in}" if self.waits_in else ""
        place = " ".join(part for part in (waits, f"at {self.at}" if self.at else "") if part)
        return ", ".join(part for part in (self.doing, place) if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """Which rank's watchdog expired first; ``token`` is another one at each expiry."""

    rank: int
    host: str
    pid: int
    token: str


class HeartbeatFolder:
    """The files of one launch. Those of another ``launch`` are not seen; launches may share a name
    all the same (torchrun with a fixed port), so the controller removes what earlier ones left.

    The folder itself is the controller's to make; until it is there nothing is written or read.
    """

    def __init__(self, path: Path, launch: str) -> None:
        self.path, self._launch = path, launch

    def begin(self) -> None:
        """Make the folder, without files of earlier launches; a rank that has begun already writes
        its own again."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file in (*self.path.glob("rank_*.json"), self.path / HANG_FILE):
            file.unlink(missing_ok=True)

    def write(self, beat: Heartbeat) -> None:
        """Write a rank's file. Raises OSError."""
        self._write(f"rank_{beat.rank}.json", asdict(beat))

    def read(self, rank: int) -> Heartbeat | None:
        """What a rank wrote last; None if it wrote nothing in this launch, or it is unreadable."""
        return self._read(f"rank_{rank}.json", Heartbeat)

    def announce(self, hang: Hang) -> None:
        """Tell the others that this rank's watchdog expired; the first word stays. Raises
        OSError."""
        if self.hang() is None:
            self._write(HANG_FILE, asdict(hang))

    def hang(self) -> Hang | None:
        """The rank whose watchdog expired first, if one has."""
        return self._read(HANG_FILE, Hang)

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        short = {k: _short(v) if isinstance(v, str) else v for k, v in fields.items()}
        content = json.dumps({"launch": self._launch, **short}).ljust(_SIZE - 1) + "\n"
        assert len(content) == _SIZE, "texts are cut so that all fits"
        file = os.open(self.path / name, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, content.encode(), 0)
        finally:
            os.close(file)

    def _read(self, name: str, kind: type[T]) -> T | None:
        for _ in range(2):  # half of a write is whole the next time
            try:
                fields = json.loads((self.path / name).read_bytes())
                if fields.pop("launch") != self._launch:
                    return None
                return kind(**fields)
            except FileNotFoundError:
                return None
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue
        return None


def _short(text: str) -> str:
    """At most ``_MAX_TEXT`` characters of ASCII."""
    return text[:_MAX_TEXT].encode("ascii", "replace").decode()
