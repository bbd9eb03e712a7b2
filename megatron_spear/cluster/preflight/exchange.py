"""How nodes talk before a run: by files in a folder that all of them see. So the talk is itself the
check of that folder, and tells how far their clocks are apart.

    node i: hello_i (nonce)  -->  node 0: call_i (nonce, token)  -->  node i: answer_i (token, its
    time), then <node>.json (token, what it found)  -->  node 0: verdict (token, exit status)

Node 0 knows its own time before it wrote the call, t0, and after it saw the answer, t1; the other's
time t lies in between. So its clock is ahead by something in [t - t1, t - t0]: the way says that to
half of t1 - t0, which is what two files take to be seen (milliseconds to tenths of a second on a
parallel file system, up to seconds on NFS, which caches). Nonce and token keep files of an earlier
preflight in the same folder apart.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_spear.cluster.preflight.results import NodeResult, read_tree
from megatron_spear.files import write_whole

_LOOK_S = 0.05
_LOOK_PER_NODE_S = 0.001

T = TypeVar("T")


class Board:
    """Small JSON files in one folder; those that cannot be read yet count as not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, tree: Mapping[str, Any]) -> None:
        """Write or replace a file, whole."""
        write_whole(self._folder / f"{name}.json", json.dumps(tree) + "\n")

    def read(self, name: str) -> dict[str, Any]:
        """A file's object; {} while there is none."""
        try:
            return read_tree((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def path(self, name: str) -> Path:
        """Where a file is."""
        return self._folder / f"{name}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockOffset:
    """How far a node's clock is ahead of node 0's, in seconds: between ``low`` and ``high``."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The best guess."""
        return (self.low + self.high) / 2

    @property
    def accuracy(self) -> float:
        """How far the guess may be off."""
        return (self.high - self.low) / 2


class NodeEnd:
    """A node's side, node 0's own included. ``now`` is its clock."""

    def __init__(self, board: Board, node: str, index: int, now: Callable[[], float]) -> None:
        self._board, self._node, self._index, self._now = board, node, index, now
        self._token = ""

    def answer(self, deadline: float) -> bool:
        """Say hello, wait for the call and answer it; False if none came until ``deadline``
        (``time.monotonic``)."""
        nonce = secrets.token_hex(8)
        hello = {"node": self._node, "index": self._index, "nonce": nonce}
        self._board.write(f"hello_{self._index}", hello)

        def call() -> str | None:
            found = self._board.read(f"call_{self._index}")
            return found.get("token") if found.get("nonce") == nonce else None

        self._token = wait_for(call, deadline) or ""
        if self._token:
            answer = {"token": self._token, "time": self._now()}
            self._board.write(f"answer_{self._index}", answer)
        return bool(self._token)

    def tell(self, result: NodeResult) -> None:
        """Give what the node has found."""
        self._board.write(self._node, {"token": self._token, **result.to_tree()})

    def heard(self, name: str) -> dict[str, Any]:
        """What node 0 has said to all under this name in this preflight; {} while it has not."""
        found = self._board.read(name)
        return found if found.get("token") == self._token else {}

    def write(self, name: str, tree: Mapping[str, Any]) -> None:
        """Say something else to node 0."""
        self._board.write(f"{name}_{self._index}", {"token": self._token, **tree})


class Heard:
    """What node 0 has heard of one node: its name, clock and result, None while it has not."""

    def __init__(self) -> None:
        self.node: str | None = None
        self.clock: ClockOffset | None = None
        self.result: NodeResult | None = None
        self.nonce = ""
        self.called_at = 0.0

    @property
    def silence(self) -> str:
        """Why there is no result, in words; empty if there is one."""
        if self.node is None:
            return "it did not start, or node 0 does not see its file"
        if self.clock is None:
            return "it started, but did not answer node 0's file"
        return "" if self.result is not None else "its checks did not end"


class Collector:
    """Node 0's side. ``now`` is its clock."""

    def __init__(self, board: Board, num_nodes: int, now: Callable[[], float]) -> None:
        self._board, self._now = board, now
        self._token = secrets.token_hex(8)
        self.nodes = [Heard() for _ in range(num_nodes)]

    def collect(self, deadline: float) -> None:
        """Talk to all nodes until each has told its result, or until ``deadline``."""

        def all_told() -> bool:
            for index, heard in enumerate(self.nodes):
                self._listen(index, heard)
            return all(heard.result is not None for heard in self.nodes)

        wait_for(lambda: all_told() or None, deadline, len(self.nodes) * _LOOK_PER_NODE_S)

    def say(self, name: str, tree: Mapping[str, Any]) -> None:
        """Say something to all nodes."""
        self._board.write(name, {"token": self._token, **tree})

    def hear(self, name: str, index: int) -> dict[str, Any]:
        """What a node has said by ``NodeEnd.write``; {} while it has not."""
        found = self._board.read(f"{name}_{index}")
        return found if found.get("token") == self._token else {}

    def _listen(self, index: int, heard: Heard) -> None:
        if heard.clock is None:
            self._greet(index, heard)
        if heard.clock is not None and heard.result is None and heard.node is not None:
            tree = self._board.read(heard.node)
            if tree.get("token") == self._token and tree.get("index") == index:
                heard.result = NodeResult.from_tree(tree)

    def _greet(self, index: int, heard: Heard) -> None:
        """Answer a hello; take the time of an answer."""
        hello = self._board.read(f"hello_{index}")
        if hello and hello.get("nonce") != heard.nonce:
            heard.node, heard.nonce = str(hello.get("node")), str(hello.get("nonce"))
            heard.called_at = self._now()
            self._board.write(f"call_{index}", {"nonce": heard.nonce, "token": self._token})
        answer = self._board.read(f"answer_{index}")
        if answer.get("token") == self._token:
            seen_at, time_there = self._now(), float(answer["time"])
            heard.clock = ClockOffset(low=time_there - seen_at, high=time_there - heard.called_at)


def wait_for(look: Callable[[], T | None], deadline: float, pause_s: float = 0.0) -> T | None:
    """What ``look`` gives once it is something; None at ``deadline`` (``time.monotonic``)."""
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(max(_LOOK_S, pause_s))
    return found
