"""One replica's group of ranks: who is told what before, while and after the weights travel.

Words go through the TCP store at which the group meets, since that can be asked without waiting;
weights go through the group. Imported in the engines' environments too.

    engine rank    ready = "" or what does not fit             ... receives   done = "" or why not
    controller     waits for all of them;  go = "" or why not  ... sends      waits for all
    other senders                          wait for go         ... send
"""

import time
from collections.abc import Callable
from concurrent.futures import wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spear import peer_groups
from megatron_spear.background import abandonable
from megatron_spear.weight_sync.sharded.records import Meeting

_POLL_S = 0.002
_LOOK_S = 0.02
"""Seconds between looks at what others say while the group is made."""


class Deadline:
    """A moment that all waits of an update share."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left, never quite 0, which torch would take for no limit."""
        return max(self._end - time.monotonic(), 0.001)

    @property
    def over(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self._end


class Link:
    """This process's end of a replica's group, kept from update to update.

    ``rank`` is that in the group: senders first, then the replica's ranks. Every method raises a
    RuntimeError or TimeoutError when others are gone or late.
    """

    def __init__(self, meeting: Meeting, rank: int, store: Any) -> None:
        self.meeting, self.rank = meeting, rank
        self._store = store
        self._group: Any = None
        self._on_cuda = meeting.backend == "nccl"

    def say(self, word: str, text: str) -> None:
        """Put ``text`` under ``word`` for all to read."""
        self._store.set(self._key(word), text)

    def hear(self, word: str, deadline: Deadline) -> str:
        """The text under ``word``, once somebody has put it."""
        key = self._key(word)
        self._store.wait([key], timedelta(seconds=deadline.left_s))
        return bytes(self._store.get(key)).decode()

    def heard(self, words: list[str]) -> bool:
        """Whether all have been said; does not wait."""
        return bool(self._store.check([self._key(word) for word in words]))

    def forget(self, words: list[str]) -> None:
        """Remove what nobody asks for any more."""
        for word in words:
            self._store.delete_key(self._key(word))

    def _key(self, word: str) -> str:
        return f"{self.meeting.name}/{word}"

    def join(self, deadline: Deadline, device: torch.device, update: int) -> None:
        """Build the group, the first time; ``device`` is this process's.

        Ends without it at the deadline, and as soon as an engine rank says that it has not got the
        weights of ``update``.
        """
        if self._group is not None:
            return
        # NCCL waits for the others without a limit, so in a thread that nobody has to wait for.
        joining = abandonable(lambda: self._made(device), f"join of {self.meeting.name}")
        try:
            while not wait((joining,), min(_LOOK_S, deadline.left_s)).done:
                if deadline.over:
                    raise TimeoutError("not all ranks joined the group before the deadline")
                self._refuse_gone(update, deadline)
        except BaseException:
            joining.add_done_callback(peer_groups.leave_unused)
            raise
        self._group = joining.result()

    def _made(self, device: torch.device) -> Any:
        peer_groups.use(device)
        meeting = self.meeting
        # A client of its own: while one waits for a key, nothing else can be asked through it.
        store = peer_groups.connect(meeting.host, meeting.port, timeout_s=meeting.timeout_s)
        return peer_groups.join(
            backend=meeting.backend,
            host=meeting.host,
            port=meeting.port,
            rank=self.rank,
            world_size=meeting.world_size,
            name=meeting.name,
            timeout_s=meeting.timeout_s,
            device=device if self._on_cuda else None,
            store=store,
        )

    def _refuse_gone(self, update: int, deadline: Deadline) -> None:
        """RuntimeError if an engine rank has ended its part with an error."""
        for rank in range(self.meeting.num_receivers):
            done = f"{update}/done/{rank}"
            if self.heard([done]) and (problem := self.hear(done, deadline)):
                raise RuntimeError(f"rank {rank} of the engine did not join: {problem}")

    def send(self, flat: Tensor, rank: int) -> Any:
        """Begin to send uint8 ``[bytes]`` to a rank of the group."""
        return self._begin(dist.isend, flat, rank)

    def receive(self, flat: Tensor, rank: int) -> Any:
        """Begin to receive into uint8 ``[bytes]``."""
        return self._begin(dist.irecv, flat, rank)

    def _begin(self, operation: Callable[..., Any], flat: Tensor, rank: int) -> Any:
        operations = [dist.P2POp(operation, flat, rank, self._group)]
        (work,) = dist.batch_isend_irecv(operations)
        return work

    def wait(self, work: Any, deadline: Deadline) -> None:
        """Wait for what was begun."""
        if not self._on_cuda:
            work.wait(timedelta(seconds=deadline.left_s))
            return
        while not work.is_completed():  # NCCL's own wait would only order streams
            if deadline.over:
                raise TimeoutError("a transfer did not end before the deadline")
            time.sleep(_POLL_S)

    def leave(self) -> None:
        """End this process's part of the group; others that wait for it notice."""
        group, self._group = self._group, None
        if group is None:
            return
        if self._on_cuda:
            group.abort()  # what was begun may never end
        peer_groups.leave(group)
