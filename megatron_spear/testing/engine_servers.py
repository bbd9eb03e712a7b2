"""Engine servers without engines: each rank is a process that takes weights as SGLang's would."""

import contextlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from megatron_spear.errors import EngineError
from megatron_spear.weight_sync.servers import GroupAddress, TensorSpec, UpdateServer

Parameters = dict[str, tuple[tuple[int, ...], torch.dtype]]


class RankServer:
    """An ``UpdateServer`` of which only ``receive_payloads`` moves weights.

    ``parameters`` are those of each rank. Close it: it has processes.
    """

    def __init__(self, name: str, parameters: Sequence[Parameters], deadline_s: float) -> None:
        self.name, self.num_ranks = name, len(parameters)
        self.serving = False
        self.version: int | None = None
        self.log: list[str] = []
        self._parameters, self._deadline_s = parameters, deadline_s
        self._ranks: list[subprocess.Popen[bytes]] = []
        self.start()

    def start(self) -> None:
        """New processes, also in place of dead ones, with models of zeros."""
        self.close()
        command = [sys.executable, "-m", "megatron_spear.testing.engine_rank"]
        self._ranks = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(self.num_ranks)
        ]
        self.build(self._parameters)

    def build(self, parameters: Sequence[Parameters]) -> None:
        """A new model in the same processes; weights are zero."""
        self._parameters = parameters
        for rank, own in enumerate(parameters):
            self.tell(rank, "build", own)

    def tell(self, rank: int, command: str, *args: Any) -> Any:
        """A rank's answer to a command; EngineError if it died."""
        process = self._ranks[rank]
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((command, args), process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError) as error:
            raise EngineError(f"rank {rank} of {self.name} died") from error

    def close(self) -> None:
        """End the processes."""
        for process in self._ranks:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._ranks = []

    def weights(self, rank: int) -> dict[str, torch.Tensor]:
        """What a rank holds."""
        stored = self.tell(rank, "stored")
        dtypes = {name: dtype for name, (_, dtype) in self._parameters[rank].items()}
        return {name: value.view(dtypes[name]) for name, value in stored.items()}

    def _later(self, what: str, work: Callable[[], None]) -> "Future[None]":
        self.log.append(what)
        result: Future[None] = Future()

        def run() -> None:
            try:
                work()
                result.set_result(None)
            except EngineError as error:
                result.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return result

    def parameter_names(self) -> "Future[frozenset[str] | None]":
        raise NotImplementedError

    def begin_update(self) -> "Future[None]":
        return self._later("begin", lambda: None)

    def end_update(self, policy_version: int) -> "Future[None]":
        def end() -> None:
            self.version = policy_version

        return self._later(f"end {policy_version}", end)

    def load_folder(self, folder: str, policy_version: int) -> "Future[None]":
        raise NotImplementedError

    def join_group(self, group: GroupAddress, first_rank: int) -> "Future[None]":
        raise NotImplementedError

    def leave_group(self, name: str) -> "Future[None]":
        raise NotImplementedError

    def receive_broadcast(
        self, tensors: Sequence[TensorSpec], group: str, policy_version: int
    ) -> "Future[None]":
        raise NotImplementedError

    def receive_payloads(
        self, payloads: Sequence[bytes], load_format: str | None, policy_version: int
    ) -> "Future[None]":
        def receive() -> None:
            errors: list[EngineError] = []

            def one(rank: int, payload: bytes) -> None:
                try:
                    self.tell(rank, "load", payload)
                except EngineError as error:
                    errors.append(error)

            threads = [
                threading.Thread(target=one, args=item, daemon=True) for item in enumerate(payloads)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(self._deadline_s)
            if any(thread.is_alive() for thread in threads):
                raise EngineError(f"{self.name} did not answer in {self._deadline_s} s")
            if errors:
                raise errors[0]

        return self._later("receive", receive)


class Servers:
    """``UpdateServers`` that are all there; remembers what was asked of it."""

    def __init__(self, servers: Sequence[RankServer]) -> None:
        self.servers = list(servers)
        self.log: list[str] = []
        self.out: dict[str, str] = {}
        self.versions: dict[str, int] = {}

    def _own(self, server: UpdateServer) -> RankServer:
        return next(own for own in self.servers if own is server)

    def reachable(self) -> Sequence[UpdateServer]:
        return self.servers

    def pause(self) -> None:
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")

    def take_out(self, server: UpdateServer, why: str) -> None:
        self.out[server.name] = why
        self._own(server).serving = False

    def admit(self, server: UpdateServer, policy_version: int) -> None:
        self.out.pop(server.name, None)
        self._own(server).serving = True
        self.versions[server.name] = policy_version
