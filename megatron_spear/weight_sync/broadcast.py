"""Weights as broadcasts of flattened buckets in the engines' update groups (gloo or NCCL).

    trainer rank 0 --+-- group 1 --> ranks of server 1         rank 0 sends; the server's
                     +-- group 2 --> ranks of server 2         tensor-parallel ranks are 1, 2, ...

Each server has a group of its own. In a group of all, one dead member fails the broadcast for all,
and none can tell whether it has the bucket; here the others do not notice. It costs a send a
server; these run side by side.
"""

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.background import abandonable, in_background, nothing_to_do
from megatron_spear.errors import EngineError, SpearError
from megatron_spear.weight_sync.buckets import Bucket, pack
from megatron_spear.weight_sync.servers import GroupAddress, UpdateServer
from megatron_spear.weight_sync.update import Update, send_buckets

_LOOK_S = 0.1
"""Seconds between looks at a broadcast whose receiver has not answered yet."""
_SOON_S = 1e-3
_LEAVE_S = 5.0
"""Seconds that servers get to forget a group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """A server's update group, the trainer's end."""

    server: UpdateServer
    name: str
    group: dist.ProcessGroup


class Broadcast:
    """A ``Delivery`` by broadcast; engines reach this process at ``host``.

    ``deadline_s`` is for the making of a group and for each broadcast. Groups stay from update to
    update; a server that failed or came back gets a new one. Tensors are packed on ``device``,
    where the backend can send from; the next bucket is packed while one is sent.
    """

    def __init__(
        self,
        *,
        host: str,
        backend: Literal["gloo", "nccl"],
        bucket_bytes: int,
        deadline_s: float,
        device: torch.device,
    ) -> None:
        self._host = host
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._deadline_s = deadline_s
        self._device = device
        self._meeting_point: dist.TCPStore | None = None
        self._run = uuid.uuid4().hex[:8]
        self._num_made = 0
        self._groups: dict[str, _Group] = {}
        self._given_up: list[tuple[_Group, Future[dist.Work]]] = []

    def deliver(self, update: Update, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        """See ``Delivery``."""
        self._sweep()
        self._leave_others(update)
        update.each("joining of its update group", self._connect)
        buckets = pack(tensors, self._bucket_bytes, self._allocate)
        return send_buckets(
            update,
            buckets,
            lambda bucket, server: in_background(
                lambda: self._send(server, bucket, update.policy_version), "weight-send"
            ),
        )

    def close(self) -> None:
        """Leave all groups. Broadcasts that a hanging server never took end by their timeout."""
        self._meeting_point = None
        held = [self._groups.pop(name) for name in list(self._groups)]
        for group in held:
            peer_groups.leave(group.group)
        wait([group.server.leave_group(group.name) for group in held], _LEAVE_S)
        patience = time.monotonic() + _LEAVE_S
        while self._sweep() and time.monotonic() < patience:
            time.sleep(_SOON_S)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _leave_others(self, update: Update) -> None:
        """Leave the groups of servers that are not updated: whoever comes back gets a new one."""
        live = {server.name for server in update.live}
        for name in [name for name in self._groups if name not in live]:
            peer_groups.leave(self._groups.pop(name).group)

    def _connect(self, server: UpdateServer) -> "Future[None]":
        """Make the server's group where there is none that can be relied on."""
        if server.serving and server.name in self._groups:
            return nothing_to_do()
        old = self._groups.pop(server.name, None)
        if self._meeting_point is None:
            self._meeting_point = peer_groups.listen(self._host, timeout_s=self._deadline_s)
        self._num_made += 1
        address = GroupAddress(
            host=self._host,
            port=self._meeting_point.port,
            name=f"weights-{self._run}-{self._num_made}",
            backend=self._backend,
            world_size=1 + server.num_ranks,
        )
        return in_background(lambda: self._make(server, address, old), "weight-group")

    def _make(self, server: UpdateServer, address: GroupAddress, old: _Group | None) -> None:
        """Join with the server; gives up as soon as the server does."""
        if old is not None:
            peer_groups.leave(old.group)
            wait((server.leave_group(old.name),), _LEAVE_S)  # a new process does not know it
        request = server.join_group(address, 1)
        joined = in_background(lambda: self._join(address), "weight-group-join")
        _, late = wait((request, joined), self._deadline_s, FIRST_EXCEPTION)
        try:
            for future in (request, joined):
                if future not in late:
                    future.result()
            if late:
                raise EngineError(f"not all ranks have joined within {self._deadline_s:g} s")
        except BaseException:
            joined.add_done_callback(peer_groups.leave_unused)
            raise
        group = joined.result()
        self._groups[server.name] = _Group(server=server, name=address.name, group=group)

    def _join(self, address: GroupAddress) -> dist.ProcessGroup:
        # A client of its own, so that no group waits for another; it fails once nobody listens.
        store = peer_groups.connect(address.host, address.port, timeout_s=self._deadline_s)
        # Without a device, as SGLang joins: NCCL's communicator is made in the first broadcast.
        # Our own deadline comes first: NCCL's watchdog ends the process at a timeout of its own.
        return peer_groups.join(
            backend=address.backend,
            host=address.host,
            port=address.port,
            rank=0,
            world_size=address.world_size,
            name=address.name,
            timeout_s=2 * self._deadline_s,
            store=store,
        )

    def _send(self, server: UpdateServer, bucket: Bucket, policy_version: int) -> None:
        """The server is asked to receive, then rank 0 sends; ends when both have ended."""
        held = self._groups[server.name]
        request = server.receive_broadcast(bucket.tensors, held.name, policy_version)
        # NCCL's first one returns when the server's ranks are there, or never.
        begun = abandonable(lambda: _begin(bucket.data, held.group), "weight-broadcast")
        try:
            _wait_for_both(request, begun, self._deadline_s)
        except BaseException as error:
            self._give_up(held, begun)
            if isinstance(error, SpearError) or not isinstance(error, RuntimeError):
                raise
            raise EngineError(f"the broadcast to it failed: {_short(error)}") from error

    def _give_up(self, held: _Group, begun: "Future[dist.Work]") -> None:
        """Use the group no more. It is kept while the backend still tries, since dropping it would
        wait for that; a server that lives ends that by leaving."""
        if self._groups.get(held.server.name) is held:
            del self._groups[held.server.name]
        held.group.abort()
        held.server.leave_group(held.name)
        self._given_up.append((held, begun))

    def _sweep(self) -> int:
        """Drop groups whose last broadcast has ended, well or not; how many are left."""
        for held, begun in list(self._given_up):
            if _ended(begun):
                self._given_up.remove((held, begun))
                peer_groups.leave(held.group)
        return len(self._given_up)


def _begin(data: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    work = dist.broadcast(data, src=0, group=group, async_op=True)
    assert work is not None, "rank 0 is in the group"
    return work


def _ended(begun: "Future[dist.Work]") -> bool:
    """Whether a broadcast has ended, well or not."""
    if not begun.done():
        return False
    return begun.exception() is not None or bool(begun.result().is_completed())


def _wait_for_both(request: "Future[None]", begun: "Future[dist.Work]", limit_s: float) -> None:
    """EngineError or RuntimeError as soon as one side fails, or after ``limit_s`` seconds."""
    deadline = time.monotonic() + limit_s
    while not (request.done() and _ended(begun)):
        if time.monotonic() > deadline:
            raise EngineError(f"it did not take a bucket within {limit_s:g} s")
        if request.done():
            request.result()
            time.sleep(_SOON_S)  # it has all: our own end follows
        elif _ended(begun):
            begun.result().wait()  # raises if it failed
            wait((request,), _LOOK_S)
        else:
            wait((request,), _LOOK_S)
    request.result()
    begun.result().wait()


def _short(error: BaseException) -> str:
    """What a collective's error says, without advice."""
    return str(error).partition(". This is typically")[0].splitlines()[0]
