"""Engine servers for tests of weight updates: processes that receive for real and can fail.

    with ServerProcesses(2) as processes, FakeFleet(processes, names) as fleet:
        transport = ServerTransport(servers=fleet, ...)
        fleet.servers[1].fail("receive_broadcast", "die", call=2)
        transport.publish(1)
        fleet.servers[0].held()           # what its ranks hold by now

Like SGLang they take names they do not know without a word, and weights within an update only. They
compute nothing: what counts is what they hold.
"""

import pickle
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_spear.errors import EngineError
from megatron_spear.testing.ranks import fork_context
from megatron_spear.testing.server_rank import serve_rank
from megatron_spear.weight_sync.servers import GroupAddress, TensorSpec, UpdateServer

Kind = Literal["refuse", "die", "late"]
Held = dict[str, torch.Tensor]


class ServerProcesses:
    """Processes for ``num_servers`` servers of ``num_ranks`` ranks each; a context manager.

    A picklable list of addresses (``addresses``) lets another process be their client.
    """

    def __init__(self, num_servers: int, num_ranks: int = 1) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fake-servers-")
        self._running: dict[str, Any] = {}
        self.addresses = [
            [str(Path(self._folder.name) / f"{server}-{rank}") for rank in range(num_ranks)]
            for server in range(num_servers)
        ]

    def __enter__(self) -> "ServerProcesses":
        for address in self._all():
            self._start(address)
        return self

    def __exit__(self, *exc: object) -> None:
        for address in self._all():
            self._end(address)
        self._folder.cleanup()

    def restart(self, server: int) -> None:
        """A new process in the place of each of the server's, whether it lives or not."""
        for address in self.addresses[server]:
            self._end(address)
            self._start(address)

    def _all(self) -> list[str]:
        return [address for server in self.addresses for address in server]

    def _start(self, address: str) -> None:
        process = fork_context().Process(target=serve_rank, args=(address,), daemon=True)
        process.start()
        self._running[address] = process

    def _end(self, address: str) -> None:
        process = self._running.pop(address)
        process.kill()
        process.join()
        Path(address).unlink(missing_ok=True)


class FakeServer:
    """An ``UpdateServer``, the client's end; ``called`` lists what was asked of it.

    ``parameters`` is what it says it holds.
    """

    def __init__(
        self, name: str, addresses: Sequence[str], parameters: frozenset[str] | None
    ) -> None:
        self.name = name
        self.num_ranks = len(addresses)
        self.serving = False
        self.parameters = parameters
        self.called: list[str] = []
        self.deadline_s = 60.0
        self.paused = False
        self._addresses = addresses
        self._pool = ThreadPoolExecutor(1)
        self._connections: list[Connection] = []

    def connect(self) -> None:
        """Connect (again) to its processes."""
        self.close()
        self._pool = ThreadPoolExecutor(1)
        self._connections = [_dial(address) for address in self._addresses]

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections:
            connection.close()
        self._connections = []
        self._pool.shutdown(wait=False)

    def fail(self, method: str, kind: Kind, call: int = 1) -> None:
        """The ``call``-th ``method`` from now on is refused, kills it or goes unanswered."""
        self._call("fail", *[(method, kind, call)] * self.num_ranks).result()

    def held(self) -> list[Held]:
        """What each rank holds."""
        return [
            {name: data.view(dtype).view(shape) for name, (data, dtype, shape) in rank.items()}
            for rank in self._call("held", *[()] * self.num_ranks).result()
        ]

    def version(self) -> int | None:
        """The version it would name in its answers."""
        told: list[int | None] = self._call("version", *[()] * self.num_ranks).result()
        (version,) = set(told)
        return version

    def parameter_names(self) -> "Future[frozenset[str] | None]":
        future: Future[frozenset[str] | None] = Future()
        future.set_result(self.parameters)
        return future

    def begin_update(self) -> "Future[None]":
        return self._each("begin_update")

    def end_update(self, policy_version: int) -> "Future[None]":
        return self._each("end_update", policy_version)

    def load_folder(self, folder: str, policy_version: int) -> "Future[None]":
        return self._each("load_folder", folder, policy_version)

    def join_group(self, group: GroupAddress, first_rank: int) -> "Future[None]":
        self.called.append("join_group")
        each = ((group, first_rank + rank) for rank in range(self.num_ranks))
        return self._call("join_group", *each)

    def leave_group(self, name: str) -> "Future[None]":
        return self._each("leave_group", name)

    def receive_broadcast(
        self, tensors: Sequence[TensorSpec], group: str, policy_version: int
    ) -> "Future[None]":
        return self._each("receive_broadcast", tensors, group, policy_version)

    def receive_payloads(
        self, payloads: Sequence[bytes], load_format: str | None, policy_version: int
    ) -> "Future[None]":
        self.called.append("receive_payloads")
        assert len(payloads) == self.num_ranks
        return self._call("receive_payloads", *((p, load_format, policy_version) for p in payloads))

    def _each(self, method: str, *arguments: object) -> "Future[Any]":
        self.called.append(method)
        return self._call(method, *[arguments] * self.num_ranks)

    def _call(self, method: str, *arguments: tuple[object, ...]) -> "Future[Any]":
        """Ask every rank, in the order of the calls."""
        return self._pool.submit(self._ask, method, arguments, self.paused)

    def _ask(self, method: str, arguments: Sequence[tuple[object, ...]], paused: bool) -> list[Any]:
        if method in _NEED_A_PAUSE and not paused:
            raise EngineError(f"{self.name} was not paused when it was asked to {method}")
        answers = []
        try:
            for connection, own in zip(self._connections, arguments, strict=True):
                connection.send_bytes(pickle.dumps((method, own)))
            for connection in self._connections:
                if not connection.poll(self.deadline_s):
                    raise EngineError(f"{self.name} gave no answer in {self.deadline_s} s")
                answers.append(pickle.loads(connection.recv_bytes()))
        except (EOFError, OSError) as error:
            raise EngineError(f"{self.name} died in {method}: {error!r}") from error
        for problem, _ in answers:
            if problem is not None:
                raise EngineError(f"{self.name} refused {method}: {problem}")
        return [value for _, value in answers]


class FakeFleet:
    """``UpdateServers`` over servers that may fail; a context manager.

    ``events`` has pause and resume, ``taken_out`` the reasons, ``admitted`` the versions.
    """

    def __init__(
        self, addresses: Sequence[Sequence[str]], parameters: Iterable[str] | None
    ) -> None:
        names = None if parameters is None else frozenset(parameters)
        self.servers = [
            FakeServer(f"http://server-{number}", own, names)
            for number, own in enumerate(addresses)
        ]
        self.events: list[str] = []
        self.taken_out: dict[str, str] = {}
        self.admitted: dict[str, int] = {}

    def __enter__(self) -> "FakeFleet":
        for server in self.servers:
            server.connect()
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self.servers:
            server.close()

    def reachable(self) -> Sequence[UpdateServer]:
        return list(self.servers)

    def pause(self) -> None:
        self._set_paused(True)

    def resume(self) -> None:
        self._set_paused(False)

    def take_out(self, server: UpdateServer, why: str) -> None:
        self._own(server).serving = False
        self.taken_out[server.name] = why

    def admit(self, server: UpdateServer, policy_version: int) -> None:
        self._own(server).serving = True
        self.admitted[server.name] = policy_version

    def _own(self, server: UpdateServer) -> FakeServer:
        return next(own for own in self.servers if own is server)

    def _set_paused(self, paused: bool) -> None:
        self.events.append("pause" if paused else "resume")
        for server in self.servers:
            server.paused = paused


_NEED_A_PAUSE = ("begin_update", "load_folder", "receive_broadcast", "receive_payloads")


def _dial(address: str) -> Connection:
    deadline = time.monotonic() + 60.0
    while True:
        try:
            return Client(address, family="AF_UNIX")
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
