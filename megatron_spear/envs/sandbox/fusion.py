"""Client of a SandboxFusion server (bytedance/SandboxFusion): code runs on other machines.

``POST /run_code`` takes ``{"code", "language", "run_timeout", "memory_limit_MB", ..}`` and gives
``{"status": Success | Failed | SandboxError, "message", "run_result": {"status": Finished | Error |
TimeLimitExceeded, "execution_time", "return_code", "stdout", "stderr"}}``.
"""

import contextlib
import http.client
import json
import logging
import socket
import time
import urllib.parse
from typing import Any

from megatron_spear.envs.sandbox.execution import Execution, Status, beginning, end, refusal
from megatron_spear.errors import ConfigError, EnvironmentFault

log = logging.getLogger(__name__)

QUEUE_S = 60.0
"""How long all requests for one piece of code may take beyond its own time, pauses included: they
may have to wait for their turn."""

_PAUSE_S, _MAX_PAUSE_S = 0.5, 8.0
_MAX_ANSWER = 64 << 20
_CHUNK = 1 << 16
_BUSY = 429


class _TryAgain(Exception):
    """A request that may well succeed the next time; says why it did not."""


class FusionSandbox:
    """Sends code to a server, again where that fails for a reason of the server's, ``attempts``
    times in all and for ``timeout_s + QUEUE_S`` in all; then EnvironmentFault."""

    def __init__(
        self, *, url: str, timeout_s: float, memory_mb: int, max_output_chars: int, attempts: int
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"sandbox.url={url!r}; expected http://HOST:PORT")
        self._url, self._secure = url, parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/") + "/run_code"
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._max_chars, self._attempts = max_output_chars, attempts

    def run(self, code: str) -> Execution:
        """Run code; see ``execution.Sandbox``."""
        if (refused := refusal(code)) is not None:
            return refused
        began, pause_s, attempt = time.monotonic(), _PAUSE_S, 1
        deadline = began + self._timeout_s + QUEUE_S
        while True:
            try:
                return self._read(self._post(code, deadline))
            except _TryAgain as error:
                why = str(error)
            if attempt == self._attempts or time.monotonic() + pause_s >= deadline:
                break
            log.warning("SandboxFusion at %s: %s; trying again", self._url, why)
            time.sleep(pause_s)
            attempt, pause_s = attempt + 1, min(2 * pause_s, _MAX_PAUSE_S)
        raise EnvironmentFault(
            f"SandboxFusion at {self._url} failed {attempt} times in "
            f"{time.monotonic() - began:.0f} s, last: {why}"
        )

    def close(self) -> None:
        """Nothing is held."""

    def _post(self, code: str, deadline: float) -> bytes:
        """The answer's body, by the deadline."""
        body = {
            "code": code,
            "language": "python",
            "compile_timeout": self._timeout_s,
            "run_timeout": self._timeout_s,
            "memory_limit_MB": self._memory_mb,
            "files": {},
            "fetch_files": [],
        }
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_left(deadline))
        with contextlib.closing(connection):
            try:
                connection.connect()
                sock = connection.sock
                sock.settimeout(_left(deadline))
                headers = {"Content-Type": "application/json"}
                connection.request("POST", self._path, json.dumps(body), headers)
                sock.settimeout(_left(deadline))
                response = connection.getresponse()
                answer = _read_all(response, sock, deadline)
            except (OSError, http.client.HTTPException) as error:
                raise _TryAgain(f"{type(error).__name__}: {error}") from error
        if response.status >= 500 or response.status == _BUSY:
            raise _TryAgain(f"status {response.status}: {_excerpt(answer)}")
        if response.status != 200:
            raise EnvironmentFault(
                f"SandboxFusion at {self._url} answered {response.status} to POST {self._path}: "
                f"{_excerpt(answer)}; expected 200"
            )
        return answer

    def _read(self, answer: bytes) -> Execution:
        try:
            told = json.loads(answer)
            status, ran = told["status"], told["run_result"]
            if status == "SandboxError" or ran is None or ran["status"] == "Error":
                raise _TryAgain(f"SandboxError: {_excerpt(str(told.get('message')).encode())}")
            stdout, stderr = ((ran[name] or "").encode("utf-8", "replace") for name in _STREAMS)
            fate = _status(ran, stderr)
            time_s = float(ran.get("execution_time") or 0.0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _TryAgain(f"no answer of /run_code ({error!r}): {_excerpt(answer)}") from error
        return Execution(
            beginning(stdout, len(stdout), self._max_chars),
            end(stderr, len(stderr), self._max_chars),
            fate,
            time_s,
        )


_STREAMS = ("stdout", "stderr")


def _status(ran: dict[str, Any], stderr: bytes) -> Status:
    """The server tells time-outs apart; memory and signals show in the result alone."""
    if ran["status"] == "TimeLimitExceeded":
        return "timeout"
    if ran["status"] != "Finished":
        raise ValueError(f"run_result.status is {ran['status']!r}")
    code = ran["return_code"]
    if code == 0:
        return "ok"
    if stderr.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError"):
        return "memory"
    return "killed" if code is not None and code < 0 else "error"


def _read_all(response: http.client.HTTPResponse, sock: socket.socket, deadline: float) -> bytes:
    """The body, by the deadline however slowly it comes."""
    data = bytearray()
    while True:
        if not response.isclosed():
            sock.settimeout(_left(deadline))
        part = response.read1(_CHUNK)
        if not part:
            return bytes(data)
        data += part
        if len(data) > _MAX_ANSWER:
            raise OSError(f"an answer of more than {_MAX_ANSWER} bytes")


def _left(deadline: float) -> float:
    """Seconds until the deadline; TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0.0:
        raise TimeoutError("timed out")
    return left


def _excerpt(body: bytes) -> str:
    text = " ".join(body[:2000].decode("utf-8", "replace").split())
    return text[:300]
