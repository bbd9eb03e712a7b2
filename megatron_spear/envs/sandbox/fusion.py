"""Client of a SandboxFusion server (bytedance/SandboxFusion): code runs on other machines.

``POST /run_code`` takes ``{"code", "language", "run_timeout", "memory_limit_MB", ..}`` and gives
``{"status": Success | Failed | SandboxError, "message", "run_result": {"status": Finished | Error |
TimeLimitExceeded, "execution_time", "return_code", "stdout", "stderr"}}``.
"""

import contextlib
import http.client
import json
import logging
import time
import urllib.parse
from typing import Any

from megatron_spear.envs.sandbox.execution import Execution, Status, beginning, end, refusal
from megatron_spear.errors import ConfigError, EnvironmentFault

log = logging.getLogger(__name__)

QUEUE_S = 60.0
"""How long a request may take beyond the code's own time: it may have to wait for its turn."""

_PAUSE_S, _MAX_PAUSE_S = 0.5, 8.0
_MAX_ANSWER = 64 << 20
_CHUNK = 1 << 16
_BUSY = 429


class _TryAgain(Exception):
    """A request that may well succeed the next time; says why it did not."""


class FusionSandbox:
    """Sends code to a server, again where that fails for a reason of the server's, ``attempts``
    times in all; then EnvironmentFault."""

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
        pause_s, why = _PAUSE_S, ""
        for attempt in range(self._attempts):
            if attempt:
                log.warning("SandboxFusion at %s: %s; trying again", self._url, why)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            try:
                return self._read(self._post(code))
            except _TryAgain as error:
                why = str(error)
        raise EnvironmentFault(
            f"SandboxFusion at {self._url} failed {self._attempts} times, last: {why}"
        )

    def close(self) -> None:
        """Nothing is held."""

    def _post(self, code: str) -> bytes:
        """The answer's body."""
        body = {
            "code": code,
            "language": "python",
            "compile_timeout": self._timeout_s,
            "run_timeout": self._timeout_s,
            "memory_limit_MB": self._memory_mb,
            "files": {},
            "fetch_files": [],
        }
        deadline = time.monotonic() + self._timeout_s + QUEUE_S
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout_s + QUEUE_S)
        with contextlib.closing(connection):
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", self._path, json.dumps(body), headers)
                response = connection.getresponse()
                answer = _read_all(response, deadline)
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


def _read_all(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, by the deadline however slowly it comes."""
    data = bytearray()
    while part := response.read1(_CHUNK):
        data += part
        if len(data) > _MAX_ANSWER:
            raise OSError(f"an answer of more than {_MAX_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer is too slow")
    return bytes(data)


def _excerpt(body: bytes) -> str:
    text = " ".join(body[:2000].decode("utf-8", "replace").split())
    return text[:300]
