"""A small server of SandboxFusion's API that runs code in a sandbox of this package, for tests.

    with SandboxServer(sandbox) as server:
        FusionSandbox(url=server.url, ...).run("print(1)")
        server.fail(503)                  # the next request is answered so
        server.requests                   # what was asked, each the JSON of a body

    python -m megatron_spear.testing.sandbox_server --port 8080

It answers ``POST /run_code`` for Python and ``GET /v1/ping``, with the fields and the statuses of
the original, and 422 to a body that lacks one.
"""

import argparse
import json
import logging
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_spear.config.environments.sandbox import SandboxSection
from megatron_spear.envs.sandbox.execution import Execution, Sandbox
from megatron_spear.envs.sandbox.make import make_sandbox
from megatron_spear.errors import EnvironmentFault

log = logging.getLogger(__name__)

Failure = int | bytes
"""A status to answer with, or the bytes to send in place of an answer (none: hang up)."""


class SandboxServer:
    """Serves in threads of this process until it is closed; a context manager."""

    def __init__(self, sandbox: Sandbox, host: str = "127.0.0.1", port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.failures: deque[Failure] = deque()
        self.sandbox = sandbox
        self._server = ThreadingHTTPServer((host, port), self._handler())
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Its address."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def fail(self, *failures: Failure) -> None:
        """Answer the next requests so, one each."""
        self.failures.extend(failures)

    def wait(self) -> None:
        """Until it is closed by another thread, or interrupted."""
        self._thread.join()

    def close(self) -> None:
        """End it; the sandbox stays."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "SandboxServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path == "/v1/ping"
                self._send(200 if found else 404, "pong" if found else {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if owner.failures:
                    failure = owner.failures.popleft()
                    if isinstance(failure, int):
                        self._send(failure, {"detail": "asked to fail"})
                    else:
                        self.wfile.write(failure)
                elif self.path != "/run_code":
                    self._send(404, {"detail": "Not Found"})
                else:
                    self._send(*owner._answer(body))

            def _send(self, status: int, answer: Any) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                log.debug(format, *args)

        return Handler

    def _answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            request = json.loads(body)
            code, language = request["code"], request["language"]
            code.encode("utf-8")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return 422, {"detail": [{"msg": repr(error)}]}
        self.requests.append(request)
        if language != "python":
            return 422, {"detail": [{"loc": ["body", "language"], "msg": "only python here"}]}
        try:
            return 200, answer_of(self.sandbox.run(code))
        except EnvironmentFault as fault:
            return 200, _response("SandboxError", str(fault), None)


def answer_of(execution: Execution) -> dict[str, Any]:
    """An execution in the words of SandboxFusion."""
    status = "TimeLimitExceeded" if execution.status == "timeout" else "Finished"
    code = {"ok": 0, "timeout": None, "killed": -9, "unavailable": 1}.get(execution.status, 1)
    result = {
        "status": status,
        "execution_time": execution.time_s,
        "return_code": code,
        "stdout": execution.stdout,
        "stderr": execution.stderr,
    }
    return _response("Success" if code == 0 else "Failed", "", result)


def _response(status: str, message: str, result: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "status": status,
        "message": message,
        "compile_result": None,
        "run_result": result,
        "executor_pod_name": None,
        "files": {},
    }


def main() -> None:
    """Serve with the default settings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--workers", type=int, default=2, help="pieces of code at a time")
    args = parser.parse_args()
    sandbox = make_sandbox(SandboxSection(workers=args.workers).model_dump())
    with SandboxServer(sandbox, args.host, args.port) as server:
        server.wait()


if __name__ == "__main__":
    main()
