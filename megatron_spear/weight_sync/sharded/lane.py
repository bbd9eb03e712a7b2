"""A training rank's part in the update of one replica; the controller also speaks to the server."""

import pickle
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import torch

from megatron_spear.conversion.slices import TensorSlice
from megatron_spear.errors import EngineError, describe
from megatron_spear.weight_sync.servers import UpdateServer
from megatron_spear.weight_sync.sharded.link import Deadline, Link
from megatron_spear.weight_sync.sharded.records import Assignment, Meeting, encode_part
from megatron_spear.weight_sync.sharded.schedule import ReplicaSchedule
from megatron_spear.weight_sync.sharded.sender import send

LOADER = "megatron_spear.weight_sync.receivers.sglang.load"
"""The name under which SGLang's servers know the receiver."""
_MESSAGE = "megatron_spear.assignment"
_POLL_S = 0.002


class Lane:
    """A link to one replica with the count of its updates; see ``Link`` for who says what."""

    def __init__(self, meeting: Meeting, rank: int, store: Any, device: torch.device) -> None:
        self.meeting = meeting
        self._link = Link(meeting, meeting.senders.index(rank), store)
        self._rank, self._device = rank, device
        self._update = 0
        self._parts: tuple[ReplicaSchedule, list[bytes]] | None = None

    def run(
        self,
        schedule: ReplicaSchedule,
        slices: dict[str, TensorSlice],
        deadline: Deadline,
        server: UpdateServer | None,
        policy_version: int,
    ) -> int:
        """One update; the bytes this rank sent. EngineError if it cannot be finished in time.

        ``server`` is the controller's; other ranks pass None.
        """
        self._update += 1
        try:
            if server is None:
                refused = self._link.hear(f"{self._update}/go", deadline)
                if refused:
                    raise EngineError(refused)
                return self._send(schedule, slices, deadline)
            return self._conduct(schedule, slices, deadline, server, policy_version)
        except (RuntimeError, FutureTimeout, OSError) as error:
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"the transfer broke off: {describe(error)}") from error

    def _send(
        self, schedule: ReplicaSchedule, slices: dict[str, TensorSlice], deadline: Deadline
    ) -> int:
        self._link.join(deadline, self._device, self._update)
        own = [bucket for bucket in schedule.buckets if bucket.source == self._rank]
        return send(self._link, own, schedule.tensors, slices, deadline)

    def _conduct(
        self,
        schedule: ReplicaSchedule,
        slices: dict[str, TensorSlice],
        deadline: Deadline,
        server: UpdateServer,
        policy_version: int,
    ) -> int:
        ranks = range(self.meeting.num_receivers)
        ready = [f"{self._update}/ready/{rank}" for rank in ranks]
        done = [f"{self._update}/done/{rank}" for rank in ranks]
        go = f"{self._update}/go"
        try:
            server.begin_update().result(deadline.left_s)
            parts = self._parts_of(schedule)
            payloads = [self._payload(parts[rank], rank, deadline) for rank in ranks]
            answer = server.receive_payloads(payloads, LOADER, policy_version)
            self._await(ready, answer, deadline, "did not answer that it is ready")
        except Exception as error:
            self._link.say(go, f"the server was not ready: {describe(error)}")
            raise
        self._link.say(go, "")
        sent = self._send(schedule, slices, deadline)
        self._await(done, answer, deadline, "did not say that it has all weights")
        answer.result(deadline.left_s)
        if self._update > 1:  # of this update others may still want to read
            before = self._update - 1
            words = [f"{before}/{word}/{rank}" for word in ("ready", "done") for rank in ranks]
            self._link.forget([f"{before}/go", *words])
        return sent

    def _parts_of(self, schedule: ReplicaSchedule) -> list[bytes]:
        """The schedule as each rank of the replica is told of it, encoded once."""
        if self._parts is None or self._parts[0] is not schedule:
            ranks = range(self.meeting.num_receivers)
            self._parts = schedule, [encode_part(*schedule.part(rank)) for rank in ranks]
        return self._parts[1]

    def _payload(self, part: bytes, rank: int, deadline: Deadline) -> bytes:
        message = Assignment(
            meeting=self.meeting,
            update=self._update,
            rank=rank,
            limit_s=deadline.left_s,
            part=part,
        )
        return pickle.dumps([(_MESSAGE, message.encode())], protocol=4)

    def _await(
        self, words: list[str], answer: "Future[None]", deadline: Deadline, otherwise: str
    ) -> None:
        """Wait until every engine rank has said its word, which is empty if all is well."""
        answered_at: float | None = None
        while not self._link.heard(words):
            if answer.done():
                answer.result(0)  # its error, if it is one
                answered_at = answered_at or time.monotonic()
                if time.monotonic() - answered_at > 1.0:
                    raise EngineError(
                        f"the server answered, but a rank of it {otherwise}; its log says why (is "
                        f"{self.meeting.host}:{self.meeting.port} reachable from there?)"
                    )
            if deadline.over:
                raise EngineError(f"a rank of the server {otherwise} within the deadline")
            time.sleep(_POLL_S)
        said = [self._link.hear(word, deadline) for word in words]
        if problems := [f"rank {rank}: {text}" for rank, text in enumerate(said) if text]:
            raise EngineError("; ".join(problems))

    def close(self) -> None:
        """Leave the group."""
        self._link.leave()
