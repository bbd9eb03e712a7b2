"""JSON over HTTP to one engine server, with a deadline for every request and four kinds of failure.

| error | the server | then |
|---|---|---|
| RequestRefused | answered 4xx | nobody would serve this request: do not send it again |
| ServerBusy | answered 429 or 5xx | later, or another server |
| ServerLost | refused or dropped the connection, or answered what is no answer | another server |
| ServerLate | did not answer in time | the request's state there is unknown |
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from megatron_spear.errors import EngineError

# uvicorn, which SGLang and vLLM run in, closes a connection that was idle for 5 s; one that we kept
# for as long could be closed just as a request is written to it.
_KEEP_ALIVE_S = 3.0
_SHOWN_CHARACTERS = 300


class RequestRefused(EngineError):
    """The server will not serve this request, and no other would."""


class ServerBusy(EngineError):
    """The server is there and cannot serve the request now."""


class ServerLost(EngineError):
    """The server is gone, or it is not the server that it should be."""


class ServerLate(EngineError):
    """The server did not answer within the deadline."""


class JsonClient:
    """Requests to one server; all belong to the event loop of the first one.

    Args:
        url: ``http://host:port``.
        deadline_s: longest wait for a whole answer, where a call names no other.
        connect_deadline_s: longest wait for a connection.

    There is no limit of connections: the caller admits requests.
    """

    def __init__(self, url: str, *, deadline_s: float, connect_deadline_s: float = 10.0) -> None:
        self.url = url.rstrip("/")
        self._deadline_s = deadline_s
        self._connect_deadline_s = connect_deadline_s
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, *, deadline_s: float | None = None) -> Any:
        """The JSON that the server answers; None where the body is empty."""
        return _parsed(f"GET {self.url}{path}", await self._request("GET", path, None, deadline_s))

    async def post(
        self, path: str, body: Mapping[str, Any] | bytes, *, deadline_s: float | None = None
    ) -> Any:
        """The JSON that the server answers to ``body`` (bytes are JSON already)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return _parsed(
            f"POST {self.url}{path}", await self._request("POST", path, data, deadline_s)
        )

    async def post_for_words(self, path: str) -> str:
        """The plain text that the server answers."""
        return (await self._request("POST", path, b"{}", None)).decode("utf-8", "replace")

    async def close(self) -> None:
        """Drop all connections; what is under way fails."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(
        self, method: str, path: str, data: bytes | None, deadline_s: float | None
    ) -> bytes:
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        what = f"{method} {self.url}{path}"
        try:
            async with asyncio.timeout(limit_s):
                status, body = await self._exchange(method, path, data)
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
                raise ServerLate(
                    f"{what} had no answer within {limit_s:g} s; look at the server's log, "
                    "lower its load or raise the deadline"
                ) from None
            raise ServerLost(
                f"{what} failed: {type(error).__name__}: {error}; the server is down, restarting "
                "or not reachable from here; start it again"
            ) from error
        if status == 200:
            return body
        raise _refusal(what, status, body)

    async def _exchange(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        session = self._session
        if session is None:
            session = self._session = self._new_session()
        async with session.request(method, self.url + path, data=data) as answer:
            return answer.status, await answer.read()

    def _new_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_deadline_s),
            headers={"Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )


def _parsed(what: str, body: bytes) -> Any:
    if not body:
        return None
    try:
        return json.loads(body)
    except ValueError:
        raise ServerLost(
            f"{what} answered {_shown(body)}; expected JSON. Is this the engine's port?"
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
