"""An engine rank's end: checks what it is told, then receives its slices into its parameters.

Imported in the engines' environments: standard library, torch and light modules of this package.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_spear import peer_groups
from megatron_spear.weight_sync.sharded.link import Deadline, Link
from megatron_spear.weight_sync.sharded.records import (
    ON_THE_WAY,
    Assignment,
    Bucket,
    HeldTensor,
    Piece,
    as_rows,
    decode_part,
    places,
)

logger = logging.getLogger(__name__)

Locate = Callable[[Sequence[HeldTensor]], list[Tensor]]
"""Where each tensor lies in the engine's parameters, as views of the held shape; raises ValueError
with all that does not fit."""


class Receiver:
    """Receives updates; keeps the link to the trainer between them."""

    def __init__(self) -> None:
        self._link: Link | None = None

    def update(self, message: Sequence[Tensor], locate: Locate) -> str:
        """Take part in one update: empty, or what went wrong, which the trainer is told as well.

        ``message`` is one encoded ``Assignment``.

        Never raises: an exception would end the engine's server. Weights are untouched until all
        ranks of the engine are ready.
        """
        words: tuple[str, ...] = ()
        try:
            (encoded,) = message
            assignment = Assignment.decode(encoded)
            words = (f"{assignment.update}/ready/{assignment.rank}",)
            deadline = Deadline(assignment.limit_s)
            link = self._link_for(assignment, deadline)
            tensors, buckets = decode_part(assignment.part)
            targets = locate(tensors)
            link.say(words[0], "")
            words = (f"{assignment.update}/done/{assignment.rank}",)
            if refused := link.hear(f"{assignment.update}/go", deadline):
                return refused
            link.join(deadline, targets[0].device, assignment.update)
            receive(link, buckets, tensors, targets, deadline)
            link.say(words[0], "")
        except Exception as error:  # noqa: BLE001  (an exception would end the engine's server)
            problem = f"{type(error).__name__}: {error}"
            logger.error("weights were not received: %s", problem)
            self._say(words, problem)
            return problem
        return ""

    def _link_for(self, assignment: Assignment, deadline: Deadline) -> Link:
        """The link of the assignment's meeting; a former one is left."""
        meeting = assignment.meeting
        if self._link is not None and self._link.meeting == meeting:
            return self._link
        self.close()
        store = peer_groups.connect(meeting.host, meeting.port, timeout_s=deadline.left_s)
        self._link = Link(meeting, len(meeting.senders) + assignment.rank, store)
        return self._link

    def _say(self, words: Sequence[str], problem: str) -> None:
        """Tell the trainer, if it can be told, and leave a group that may be broken."""
        link = self._link
        if link is None:
            return
        try:
            for word in words:
                link.say(word, problem)
        except Exception as error:  # noqa: BLE001  (the trainer is gone)
            logger.error("the trainer could not be told: %s", error)
        if words and "/done/" in words[0]:
            self.close()

    def close(self) -> None:
        """Leave the group."""
        link, self._link = self._link, None
        if link is None:
            return
        try:
            link.leave()
        except Exception as error:  # noqa: BLE001  (it may be broken already)
            logger.warning("leaving the group with the trainer: %s", error)


def receive(
    link: Link,
    buckets: Sequence[Bucket],
    tensors: Sequence[HeldTensor],
    targets: Sequence[Tensor],
    deadline: Deadline,
) -> None:
    """Receive the messages in order, each while the one before is unpacked.

    A message of one piece that lies in the engine's memory as it travels is received there.
    """
    buffers = [_Buffer(), _Buffer()]
    coming: deque[tuple[Any, Bucket, _Buffer | None]] = deque()
    senders = {rank: number for number, rank in enumerate(link.meeting.senders)}

    def finish() -> None:
        work, bucket, buffer = coming.popleft()
        link.wait(work, deadline)
        if buffer is not None:
            unpack(buffer.flat(bucket.num_bytes), bucket, tensors, targets)
            buffer.free = True

    with torch.no_grad():
        for bucket in buckets:
            if len(coming) == ON_THE_WAY:
                finish()
            buffer = None
            flat = in_place(bucket, tensors, targets)
            if flat is None:
                while not any(buffer.free for buffer in buffers):
                    finish()
                buffer = next(b for b in buffers if b.free)
                buffer.free = False
                flat = buffer.make(bucket.num_bytes, targets[0].device)
            coming.append((link.receive(flat, senders[bucket.source]), bucket, buffer))
        while coming:
            finish()


class _Buffer:
    """Memory for one message, as large as the largest so far."""

    def __init__(self) -> None:
        self.free = True
        self._memory = torch.empty(0, dtype=torch.uint8)

    def make(self, num_bytes: int, device: torch.device) -> Tensor:
        """``num_bytes`` of it."""
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self.flat(num_bytes)

    def flat(self, num_bytes: int) -> Tensor:
        """What ``make`` gave."""
        return self._memory[:num_bytes]


def in_place(
    bucket: Bucket, tensors: Sequence[HeldTensor], targets: Sequence[Tensor]
) -> Tensor | None:
    """The engine's memory of a message of one piece, uint8, if it is contiguous there."""
    if len(bucket.pieces) > 1:
        return None
    (piece,) = bucket.pieces
    target = _target(piece, tensors[piece.tensor], targets[piece.tensor])
    return target.view(-1).view(torch.uint8) if target.is_contiguous() else None


def unpack(
    flat: Tensor, bucket: Bucket, tensors: Sequence[HeldTensor], targets: Sequence[Tensor]
) -> None:
    """Copy a message's pieces to where they belong."""
    for piece, held, place in places(bucket.pieces, tensors):
        target = _target(piece, held, targets[piece.tensor])
        target.copy_(flat[place].view(held.torch_dtype).view(target.shape))


def _target(piece: Piece, held: HeldTensor, target: Tensor) -> Tensor:
    """The piece's place in the view of the held part."""
    row, column = (held.start, 0) if held.axis == 0 else (0, held.start)
    return as_rows(target)[
        piece.row - row : piece.row_stop - row, piece.column - column : piece.column_stop - column
    ]
