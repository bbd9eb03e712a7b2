"""Real rollout servers on the CPU for contract tests: SGLang and vLLM as processes of their own.

    @requires_sglang()
    def test_my_client(tmp_path):
        tiny_hf_folder(tmp_path / "model")
        with sglang_server(tmp_path / "model") as server:
            ...  # requests to server.url

``tools/sglang_cpu/setup.sh`` and ``tools/vllm_cpu/setup.sh`` make the environments, in the checkout
unless SPEAR_SGLANG_VENV and SPEAR_VLLM_VENV name other folders. A start takes 20 to 130 s, so
share a server between tests. Start it in the main thread: it ends with the thread that started it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spear.errors import EngineError

ROOT = Path(__file__).parents[2]
"""The checkout: ``tools`` is no part of an installed package."""

START_LIMIT_S = 300.0
_PROBE_LIMIT_S = 5.0
_STOP_LIMIT_S = 15.0
_LOG_LINES = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerKind:
    """How a kind of server is found and started."""

    name: str
    tools: Path
    venv_variable: str
    default_venv: str
    ready_path: str
    tensor_parallel_flag: str
    cores_variable: str

    @property
    def venv(self) -> Path:
        """The environment, whether it exists or not."""
        return Path(os.environ.get(self.venv_variable) or ROOT / self.default_venv)

    @property
    def missing(self) -> str:
        """Why the server cannot be started; empty if it can."""
        if (self.venv / "bin" / "python").exists() and self._launch.exists():
            return ""
        setup = self.tools.relative_to(ROOT) / "setup.sh"
        return f"no real {self.name} in {self.venv}: {setup} builds its environment"

    @property
    def _launch(self) -> Path:
        return self.tools / "launch.sh"

    def command(
        self, folder: Path, port: int, tensor_parallel: int, extra: Sequence[str]
    ) -> list[str]:
        """The command line; without a tokenizer in the folder the server gets none."""
        line = [str(self._launch), str(self.venv), str(folder), str(port)]
        if tensor_parallel > 1:
            line += [self.tensor_parallel_flag, str(tensor_parallel)]
        if not (folder / "tokenizer_config.json").exists():
            line.append("--skip-tokenizer-init")
        return [*line, *extra]


SGLANG = ServerKind(
    name="SGLang",
    tools=ROOT / "tools" / "sglang_cpu",
    venv_variable="SPEAR_SGLANG_VENV",
    default_venv=".venv-sglang-cpu",
    ready_path="/model_info",
    tensor_parallel_flag="--tp-size",
    cores_variable="SGLANG_CPU_OMP_THREADS_BIND",
)
VLLM = ServerKind(
    name="vLLM",
    tools=ROOT / "tools" / "vllm_cpu",
    venv_variable="SPEAR_VLLM_VENV",
    default_venv=".venv-vllm-cpu",
    ready_path="/health",
    tensor_parallel_flag="--tensor-parallel-size",
    cores_variable="VLLM_CPU_OMP_THREADS_BIND",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RealServer:
    """A server that answers at ``url``; ``pid`` leads its process group."""

    url: str
    pid: int
    log: Path
    start_s: float
    """Seconds from the start of the process to the first answer."""


def requires_sglang() -> Any:
    """Marks a test that needs the real SGLang: skipped, with what to do, where it is not built."""
    return _requires(SGLANG)


def requires_vllm() -> Any:
    """Marks a test that needs the real vLLM: skipped, with what to do, where it is not built."""
    return _requires(VLLM)


def sglang_server(
    model_folder: Path, *, tensor_parallel: int = 1, extra: Sequence[str] = ()
) -> contextlib.AbstractContextManager[RealServer]:
    """The real SGLang with this model, ready; ``extra`` are arguments of ``launch_server``."""
    return _server(SGLANG, model_folder, tensor_parallel, extra)


def vllm_server(
    model_folder: Path, *, tensor_parallel: int = 1, extra: Sequence[str] = ()
) -> contextlib.AbstractContextManager[RealServer]:
    """The real vLLM with this model, ready; ``extra`` are arguments of its ``api_server``."""
    return _server(VLLM, model_folder, tensor_parallel, extra)


def _requires(kind: ServerKind) -> Any:
    import pytest

    return pytest.mark.skipif(bool(kind.missing), reason=kind.missing)


@contextlib.contextmanager
def _server(
    kind: ServerKind, model_folder: Path, tensor_parallel: int, extra: Sequence[str]
) -> Iterator[RealServer]:
    """Starts, waits for the first answer, and ends every process of the server in any case.

    Raises EngineError with the log's last lines when the server ends by itself or is not ready in
    time. The log is kept after a failure only.
    """
    if kind.missing:
        raise EngineError(kind.missing)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind.name.lower()}-server-"))
    log, port = folder / "log", _free_port()
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    env.pop("PYTHONPATH", None)  # launch.sh sets it; the tests' own is of another environment
    if tensor_parallel > 1:
        cores = sorted(os.sched_getaffinity(0))
        env[kind.cores_variable] = "|".join(
            str(cores[rank % len(cores)]) for rank in range(tensor_parallel)
        )
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*_die_with_us(), *kind.command(model_folder, port, tensor_parallel, extra)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(kind, process, url + kind.ready_path, log)
        took = time.monotonic() - started
        yield RealServer(url=url, pid=process.pid, log=log, start_s=took)
    except BaseException as error:
        error.add_note(f"the log of {kind.name}: {log}")
        raise
    finally:
        _end_group(process)
    shutil.rmtree(folder)


def _wait_until_ready(
    kind: ServerKind, process: subprocess.Popen[bytes], url: str, log: Path
) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=_PROBE_LIMIT_S):
            return
        ended = process.poll()
        if ended is not None:
            raise EngineError(f"{kind.name} ended with status {ended}\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise EngineError(f"{kind.name} was not ready after {START_LIMIT_S:g} s\n{_tail(log)}")
        time.sleep(0.25)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the whole process group to end, and kills what has not ended in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + _STOP_LIMIT_S
        while time.monotonic() < deadline:
            process.poll()  # takes the leader's exit status
            if not _group_members(process.pid):
                return
            time.sleep(0.1)
    raise EngineError(f"after SIGKILL these are left: {_group_members(process.pid)}")


def _group_members(group: int) -> list[int]:
    """The group's live processes: a zombie that nobody waits for does not count."""
    import psutil

    members = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members


def _die_with_us() -> list[str]:
    """A prefix that ends the server when the thread that started it ends, however that ends."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join(["its log ends:", *lines])
