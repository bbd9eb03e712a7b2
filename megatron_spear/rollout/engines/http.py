"""JSON over HTTP to one engine server, with deadlines and five kinds of failure.

| error | the server | then |
|---|---|---|
| RequestRefused | answered 4xx | nobody would serve this request: do not send it again |
| ServerBusy | answered 429 or 5xx | later, or another server |
| ServerLost | refused or dropped the connection, or answered what is no answer | another server |
| Unanswered | ended a connection that was kept, perhaps as the request came | once more |
| ServerLate | did not answer in time | the request's state there is unknown |
"""

import asyncio
import errno
import json
from collections.abc import Mapping
from typing import Any

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.http_connection import Connections, KeptEnded

_SHOWN_CHARACTERS = 300


class RequestRefused(EngineError):
    """The server will not serve this request, and no other would."""


class ServerBusy(EngineError):
    """The server is there and cannot serve the request now."""


class ServerLost(EngineError):
    """The server is gone, or it is not the server that it should be."""


class Unanswered(ServerLost):
    """A connection that was kept ended before any of the answer; a new one may do. A ``get`` has
    tried that."""


class ServerLate(EngineError):
    """The server did not answer within the deadline."""


class JsonClient:
    """Requests to one server; all belong to the event loop of the first one.

    Args:
        url: ``http://host:port``.
        deadline_s: longest wait for a whole answer, where a call names no other. The connection has
            no deadline of its own: when thousands of requests begin at once it is our side that is
            slow, and says nothing about the server.

    There is no limit of connections: the caller admits requests.
    """

    def __init__(self, url: str, *, deadline_s: float) -> None:
        self.url = url.rstrip("/")
        self._deadline_s = deadline_s
        self._connections = Connections(self.url)

    async def get(self, path: str, *, deadline_s: float | None = None) -> Any:
        """The JSON that the server answers; None where the body is empty."""
        return self._parsed(path, await self._in_time("GET", path, b"", deadline_s))

    async def post(
        self, path: str, body: Mapping[str, Any], *, deadline_s: float | None = None
    ) -> Any:
        """The JSON that the server answers to ``body``."""
        data = json.dumps(body).encode()
        return self._parsed(path, await self._in_time("POST", path, data, deadline_s))

    async def post_for_words(self, path: str) -> str:
        """The plain text that the server answers."""
        return (await self._in_time("POST", path, b"{}", None)).decode("utf-8", "replace")

    async def post_until_cancelled(self, path: str, body: bytes) -> Any:
        """As ``post`` for JSON that is text already, without a deadline: the caller has one."""
        return self._parsed(path, await self._request("POST", path, body))

    async def close(self) -> None:
        """Drop all connections; what is under way fails."""
        self._connections.close()

    async def _in_time(
        self, method: str, path: str, body: bytes, deadline_s: float | None
    ) -> bytes:
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._request(method, path, body)
        except TimeoutError:
            raise ServerLate(
                f"{method} {self.url}{path} had no answer within {limit_s:g} s; look at the "
                "server's log, lower its load or raise the deadline"
            ) from None

    async def _request(self, method: str, path: str, body: bytes) -> bytes:
        try:
            status, answer = await self._connections.request(method, path, body)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise EngineError(
                    f"{method} {self.url}{path} failed on our side: {error}; raise the limit of "
                    "open files (ulimit -n) or lower the requests in flight"
                ) from error
            lost = Unanswered if isinstance(error, KeptEnded) else ServerLost
            raise lost(
                f"{method} {self.url}{path} failed: {type(error).__name__}: {error}; the server is "
                "down, restarting or not reachable from here; start it again"
            ) from error
        if status == 200:
            return answer
        raise _refusal(f"{method} {self.url}{path}", status, answer)

    def _parsed(self, path: str, body: bytes) -> Any:
        if not body:
            return None
        try:
            return json.loads(str(body, "utf-8"))
        except ValueError:
            raise ServerLost(
                f"{self.url}{path} answered {_shown(body)}; expected JSON. Is this the engine's "
                "port?"
            ) from None


def _refusal(what: str, status: int, body: bytes) -> EngineError:
    """The error that stands for an HTTP status other than 200."""
    message = f"{what} answered {status}: {_message(body)}"
    if status == 429 or status >= 500:
        return ServerBusy(f"{message}; lower the load or look at the server's log")
    return RequestRefused(f"{message}; correct the request or the server's settings")


def _message(body: bytes) -> str:
    """The text in an error body, in any of the shapes servers use.

    ``{"error": {"message"}}``, ``{"error": text}``, ``{"object": "error", "message"}``,
    ``{"success": false, "message"}``, ``{"detail"}``, or the body itself.
    """
    try:
        parsed = json.loads(body)
    except ValueError:
        return _shown(body)
    if isinstance(parsed, dict):
        for key in ("error", "message", "detail"):
            found = parsed.get(key)
            if isinstance(found, dict):
                found = found.get("message")
            if found:
                return found if isinstance(found, str) else json.dumps(found)
    return _shown(body)


def _shown(body: bytes) -> str:
    text = body[:_SHOWN_CHARACTERS].decode("utf-8", "replace")
    more = f" and {len(body) - _SHOWN_CHARACTERS} bytes more" if len(body) > len(text) else ""
    return repr(text) + more
