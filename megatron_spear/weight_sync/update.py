"""One update of all reachable servers, whichever way the weights go.

    names agree? -> pause -> begin -> send ... -> end(version) -> admit -> resume

A server where any of it failed (refused, died, late) is taken out with the reason and the others go
on; what it holds then is a mixture that no request may see. It is in the next update again if it
answers. No server left is an EngineError on every training rank.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_spear.background import nothing_to_do
from megatron_spear.errors import EngineError
from megatron_spear.weight_sync.buckets import Bucket
from megatron_spear.weight_sync.export import Export, PublishingRanks
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.servers import UpdateServer, UpdateServers
from megatron_spear.weight_sync.transport import WeightSource

logger = logging.getLogger(__name__)

_GRACE_S = 1.0
"""Seconds that a call gets to tell of its own deadline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """Calls of servers that are under way: what they are for, and when they have to be done."""

    what: str
    deadline: float
    futures: tuple[tuple[UpdateServer, "Future[Any]"], ...]


class Update:
    """One update under way: ``live`` are the servers still in it.

    ``deadline_s`` is for each call of the servers. So a late server costs that time once, since it
    is out then, and nothing of the others' time.
    """

    def __init__(self, servers: UpdateServers, policy_version: int, deadline_s: float) -> None:
        self.policy_version = policy_version
        self.num_lost = 0
        self.pause_s = 0.0
        self._deadline_s = deadline_s
        self._servers = servers
        self._why: dict[str, str] = {}
        self._paused_at: float | None = None
        self._begun = False
        self.live = list(servers.reachable())
        self.refuse_none_left()

    def pause(self) -> None:
        """Engines stop generating; from here on no server's weights can be relied on."""
        self._paused_at = time.monotonic()
        self._servers.pause()
        self._begun = True

    def each(self, what: str, call: Callable[[UpdateServer], "Future[Any]"]) -> None:
        """Call every live server at once and wait for all."""
        self.settle(self.start(what, call))

    def start(self, what: str, call: Callable[[UpdateServer], "Future[Any]"]) -> Calls:
        """Call every live server; ``settle`` waits."""
        return Calls(
            what=what,
            deadline=time.monotonic() + self._deadline_s + _GRACE_S,
            futures=tuple((server, call(server)) for server in self.live),
        )

    def settle(self, calls: Calls) -> None:
        """Wait for calls, and take out the servers where they failed."""
        for server, future in calls.futures:
            try:
                future.result(max(0.0, calls.deadline - time.monotonic()))
            except TimeoutError:
                self.lose(server, f"{calls.what}: no answer within {self._deadline_s:g} s")
            except (RuntimeError, OSError, CancelledError) as error:  # EngineError, torch's, HTTP's
                self.lose(server, f"{calls.what}: {error or type(error).__name__}")
        self.refuse_none_left()

    def lose(self, server: UpdateServer, why: str) -> None:
        """Take a server out."""
        self.live = [other for other in self.live if other is not server]
        self._why[server.name] = why
        self.num_lost += 1
        logger.warning(
            "server %s is taken out of the rollouts, it does not get policy version %d: %s",
            server.name,
            self.policy_version,
            why,
        )
        self._servers.take_out(server, why)

    def close(self, done: bool) -> None:
        """Admit the live servers if the update is ``done``, else take them out; then resume."""
        try:
            if done:
                for server in self.live:
                    self._servers.admit(server, self.policy_version)
            elif self._begun:
                for server in self.live:
                    self.lose(server, "the update was not brought to its end")
        finally:
            if self._paused_at is not None:
                self._servers.resume()
                self.pause_s = time.monotonic() - self._paused_at

    def metrics(self, sent: int, send_s: float) -> dict[str, float]:
        """What the closed update is told by; ``sent`` are bytes."""
        return {
            "weight_sync/bytes": float(sent),
            "weight_sync/num_servers": float(len(self.live)),
            "weight_sync/num_taken_out": float(self.num_lost),
            "weight_sync/pause_s": self.pause_s,
            "weight_sync/send_s": send_s,
        }

    def refuse_none_left(self) -> None:
        """EngineError if no server is live."""
        if not self.live:
            why = "; ".join(f"{name}: {why}" for name, why in self._why.items())
            raise EngineError(
                f"no engine server has taken policy version {self.policy_version}: "
                f"{why or 'none is reachable'}; restart the servers and resume the run"
            )


class Delivery(Protocol):
    """One way from the controller to the servers."""

    def deliver(self, update: Update, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        """Bring the tensors to all live servers, with the pause where this way needs it, and close
        their updates; returns the bytes sent. Servers that fail are taken out of ``update``."""
        ...

    def close(self) -> None:
        """See ``Transport.close``."""
        ...


class ServerTransport:
    """A ``Transport`` to engine servers; ``servers`` and ``delivery`` are None but on rank 0.

    ``control`` is a gloo group of all training ranks (None: one rank). The others wait in it while
    rank 0 sends, so its timeout has to be above ``deadline_s``, what each call of a server may
    take. Metrics: bytes (to all servers together), num_servers (updated), num_taken_out, pause_s
    (engines stood still), send_s (all but the check of names).
    """

    def __init__(
        self,
        *,
        source: WeightSource,
        manifest: Manifest,
        servers: UpdateServers | None,
        delivery: Delivery | None,
        control: dist.ProcessGroup | None,
        deadline_s: float,
    ) -> None:
        self._ranks = PublishingRanks(source, control)
        self._manifest = manifest
        self._servers = servers
        self._delivery = delivery
        self._deadline_s = deadline_s

    def publish(self, policy_version: int) -> dict[str, float]:
        """See ``Transport``."""
        update = None
        if self._servers is not None and self._delivery is not None:
            update = partial(self._update, self._servers, self._delivery, policy_version)
        return self._ranks.publish(policy_version, update)

    def close(self) -> None:
        """See ``Transport``."""
        if self._delivery is not None:
            self._delivery.close()

    def _update(
        self, servers: UpdateServers, delivery: Delivery, policy_version: int, export: Export
    ) -> dict[str, float]:
        update = Update(servers, policy_version, self._deadline_s)
        done = False
        try:
            self._check_names(update)
            started = time.monotonic()
            sent = delivery.deliver(update, self._manifest.tensors(export))
            send_s = time.monotonic() - started
            done = True
        finally:
            update.close(done)
        return update.metrics(sent, send_s)

    def _check_names(self, update: Update) -> None:
        """Take out new servers whose parameters are not what the policy exports."""
        calls = update.start(
            "names of its parameters",
            lambda server: nothing_to_do() if server.serving else server.parameter_names(),
        )
        update.settle(calls)
        for server, names in calls.futures:
            if server in update.live and (problem := self._manifest.problem(names.result())):
                update.lose(server, problem)
        update.refuse_none_left()


def send_buckets(
    update: Update,
    buckets: Iterable[Bucket],
    send: Callable[[Bucket, UpdateServer], "Future[Any]"],
) -> int:
    """Pause, open the update, send bucket after bucket and close it; returns the bytes sent.

    While a bucket is sent the next is made: ``buckets`` may write to memory of the last but one.
    """
    sent = 0
    calls = None
    update.pause()
    update.each("begin of the update", lambda server: server.begin_update())
    for bucket in buckets:
        if calls is not None:
            update.settle(calls)
        calls = update.start("weights", partial(send, bucket))
        sent += bucket.num_bytes * len(calls.futures)
    if calls is not None:
        update.settle(calls)
    update.each("end of the update", lambda server: server.end_update(update.policy_version))
    return sent
