"""One worker as the pool sees it: send, receive, deadline, kill, blame.

Everything here is driven by the caller's event loop; nothing blocks on the socket. The loop
watches the socket only while calls are pending, so the link may move to another loop between two
rollouts. Where the worker is, is its far end's business: a process of our own (``env_local``) or
one behind a server, on another machine (``env_remote``).

The worker notes which call it serves in a memory file of its own machine that outlives it; so the
call that killed it, or in which it hung, is known. Of a machine that does not answer any more it is
not: then the call that has waited longest is blamed, since calls are served in order.
"""

import asyncio
import pickle
import socket
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from megatron_spear.errors import EnvironmentFault
from megatron_spear.rollout.env_frames import ENDED, READ_BYTES, FrameReader, pack
from megatron_spear.rollout.env_local import Ending
from megatron_spear.rollout.env_worker import HELLO

START_DEADLINE_S = 60.0
_LAST_WORD_S = 5.0


class WorkerLost(Exception):
    """The worker ended in somebody else's call: this one is to be made again in a new worker."""


class FarEnd(Protocol):
    """The worker behind a link; ``channel`` is its socket, not blocking, once there is one."""

    channel: "Future[socket.socket]"

    def gone(self) -> bool:
        """Whether it has ended, as far as can be told without a call."""
        ...

    def kill(self) -> Ending | None:
        """End it at once. None: how it ended comes as a frame ``ENDED``, if at all."""
        ...

    def close(self, wait_s: float) -> None:
        """Close the channel; a worker that is still there may close its environments for
        ``wait_s``."""
        ...


class WorkerLink:
    """A worker, its socket and its pending calls.

    ``deadline_s`` bounds the time without any reply while calls are pending; calls of one worker
    run one after the other, so that is the deadline of the call it is busy with. A link that
    broke stays broken: ``broken`` says why, ``unusable`` that a new worker would be no better (the
    environment cannot be loaded).
    """

    def __init__(
        self,
        name: str,
        worker: FarEnd,
        factory: str,
        options: Mapping[str, Any],
        deadline_s: float,
    ) -> None:
        self.broken = ""
        self.unusable = False
        self._name = name
        self._worker = worker
        self._deadline_s = deadline_s
        self._ready = self._over = False
        self._next_id = HELLO + 1
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._reader = FrameReader()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._progress_at = 0.0
        self._socket = worker.channel.result() if worker.channel.done() else None
        self._outgoing = bytearray(pack(HELLO, (factory, dict(options))))
        self._flush_due = self._writing = False

    def alive(self) -> bool:
        """False once the worker is gone, whether noticed by a call or not."""
        if not self.broken and self._worker.gone():
            self._break(f"{self._name} died")
        return not self.broken

    def call(self, payload: tuple[Any, ...]) -> "asyncio.Future[Any]":
        """Send one operation; the future gets its value, or raises.

        EnvironmentFault: the call itself failed, ended the worker or passed its deadline, or the
        pool was closed. WorkerLost: the worker ended otherwise. Calls made before the loop next
        turns leave in one write. Raises EnvironmentFault when the payload cannot be pickled.
        """
        try:
            frame = pack(self._next_id, payload)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise EnvironmentFault(
                f"the options of an environment call cannot be sent to {self._name}: {error}"
            ) from error
        loop = self._attach()
        future: asyncio.Future[Any] = loop.create_future()
        if not self._pending:
            self._progress_at = loop.time()
            self._watch(loop)
        self._pending[self._next_id] = future
        self._next_id += 1
        self._send(loop, frame)
        return future

    def close(self, wait_s: float = 1.0) -> None:
        """End the worker: it may close its environments for ``wait_s``, then it is killed."""
        self._end("the environment pool was closed", blamed=None)
        self._worker.close(wait_s)

    def _attach(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return loop
        old = self._loop
        if old is not None and not old.is_closed():
            if any(not future.done() for future in self._pending.values()):
                raise RuntimeError(f"{self._name} is in use by another event loop")
            self._unwatch(old)
        self._loop, self._timer = loop, None
        self._flush_due = self._writing = False
        # Nobody waits for these any more; should the worker hang in one, the next call finds out.
        self._pending = {}
        return loop

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._limit_s, self._check_deadline)
        if self._socket is not None:
            loop.add_reader(self._socket.fileno(), self._receive)
        else:
            opening = asyncio.wrap_future(self._worker.channel, loop=loop)
            opening.add_done_callback(self._connected)

    def _unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None and not loop.is_closed():
            loop.remove_reader(self._socket.fileno())
            loop.remove_writer(self._socket.fileno())
        self._writing = False

    def _connected(self, opening: "asyncio.Future[socket.socket]") -> None:
        loop, problem = opening.get_loop(), opening.exception()
        if self.broken or loop is not self._loop:
            return
        if problem is not None:
            self._break(f"{self._name} was {problem}")
            return
        self._socket = opening.result()
        self._progress_at = loop.time()
        loop.add_reader(self._socket.fileno(), self._receive)
        self._flush()

    @property
    def _limit_s(self) -> float:
        return self._deadline_s if self._ready else max(self._deadline_s, START_DEADLINE_S)

    def _check_deadline(self) -> None:
        assert self._loop is not None
        left = self._progress_at + self._limit_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_deadline)
            return
        doing = "answer a call" if self._ready else "start"
        self._break(f"{self._name} did not {doing} within {self._limit_s:g} s and was killed")

    def _send(self, loop: asyncio.AbstractEventLoop, frame: bytes) -> None:
        self._outgoing += frame
        if self._socket is not None and not (self._flush_due or self._writing):
            self._flush_due = True
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self.broken or self._loop is None or self._socket is None:
            return
        try:
            sent = self._socket.send(self._outgoing)
            del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._break(f"{self._name} died")
            return
        if self._outgoing and not self._writing:
            self._loop.add_writer(self._socket.fileno(), self._flush)
        elif self._writing and not self._outgoing:
            self._loop.remove_writer(self._socket.fileno())
        self._writing = bool(self._outgoing)

    def _receive(self) -> None:
        assert self._loop is not None and self._socket is not None
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._break(f"{self._name} died", last_word=False)
            return
        self._progress_at = self._loop.time()
        for call_id, payload in self._reader.feed(data):
            self._settle(call_id, payload)
        if not self._pending and not self.broken:
            self._unwatch(self._loop)

    def _settle(self, call_id: int, payload: bytes) -> None:
        if self.broken and call_id != ENDED:
            return  # an answer that comes too late
        try:
            good, value = pickle.loads(payload)
        except Exception as error:  # noqa: BLE001 - a reply that cannot be read costs its own call
            good, value = False, f"its reply cannot be unpickled: {error}"
        future = self._pending.pop(call_id, None)
        if call_id == ENDED:
            self.broken = self.broken or f"{self._name} died"
            self._lost(Ending(*value) if good else None)
        elif call_id == HELLO:
            self._ready = good
            if not good:
                self.unusable = True
                self._break(f"{self._name} could not load the environment: {value}")
        elif future is not None and not future.done():
            if good:
                future.set_result(value)
            else:
                future.set_exception(EnvironmentFault(f"in {self._name}: {value}"))

    def _break(self, reason: str, *, last_word: bool = True) -> None:
        """The worker is of no use any more: end it, and blame the call it was busy with.

        ``last_word`` False: nothing more comes on the socket that could say which that was.
        """
        ending = None
        if not self.broken:
            self.broken = reason
            ending = self._worker.kill()
            if ending is None and last_word and self._pending and self._loop is not None:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_later(_LAST_WORD_S, self._lost)
                return
        self._lost(ending)

    def _lost(self, ending: Ending | None = None) -> None:
        """The worker has ended, or nothing more is heard of it (None)."""
        if ending is None:
            oldest = min(self._pending, default=HELLO) if self._ready else HELLO
            ending = Ending("nothing more is known", oldest)
        self._end(f"{self.broken} ({ending.fate})", blamed=ending.blamed)
        self._worker.close(0.0)

    def _end(self, reason: str, *, blamed: int | None) -> None:
        """End all pending calls: the ``blamed`` one (None: all) with a fault, others as lost."""
        if self._over:
            return
        self._over, self.broken = True, reason
        if self._loop is not None:
            self._unwatch(self._loop)
        pending, self._pending = self._pending, {}
        for call_id, future in pending.items():
            error = EnvironmentFault if blamed in (None, call_id) else WorkerLost
            if not future.get_loop().is_closed():
                future.get_loop().call_soon_threadsafe(_set_error, future, error(reason))


def _set_error(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
