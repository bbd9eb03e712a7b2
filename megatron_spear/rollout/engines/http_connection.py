"""HTTP/1.1 connections to one server: one request at a time on each, kept for the next.

A client of our own, since one core must serve thousands of requests a second beside the rollouter:
a general client costs some four times as much for each. It speaks what the engines' servers do:
no redirects, cookies, compression or proxies; answers with a length, in chunks, or up to the end of
the connection.
"""

import asyncio
import resource
import ssl
from urllib.parse import urlsplit

from megatron_spear.errors import ConfigError

# uvicorn, which SGLang and vLLM run in, closes a connection that was idle for 5 s; one that we kept
# for as long could be closed just as a request is written to it.
KEEP_ALIVE_S = 3.0
# RFC 8305: a name's next address is tried beside one that has not answered for so long.
_NEXT_ADDRESS_S = 0.25
_MAX_HEAD_BYTES = 64 << 10
_SMALL_BYTES = 64 << 10
# Files and sockets that the process has open beside connections.
_OTHER_FILES = 512

Reply = tuple[int, bytes]
"""HTTP status and body."""


class KeptEnded(ConnectionError):
    """A connection that had answered before ended with none of this answer: the server may have
    ended it just as the request was written, and not have seen that."""


class Connection(asyncio.Protocol):
    """One connection; ``reply`` is the answer that is awaited, ``reusable`` that another request
    may follow it."""

    def __init__(self) -> None:
        self.reusable = True
        self.idle_since_s = 0.0
        self.transport: asyncio.Transport | None = None
        self.reply: asyncio.Future[Reply] | None = None
        self._data = b""
        self._has_answered = False

    def send(self, head: bytes, body: bytes) -> "asyncio.Future[Reply]":
        """Write a request; the future raises ConnectionError where no whole answer comes."""
        assert self.transport is not None
        self.reply = asyncio.get_running_loop().create_future()
        if len(body) <= _SMALL_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        return self.reply

    def abort(self) -> None:
        """Drop it, with whatever is under way."""
        self.reusable = False
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data
        try:
            reply = _parse(self._data)
        except ValueError as error:
            self._fail(ConnectionError(f"it does not speak HTTP/1.1: {error}"))
            self.abort()
            return
        if reply is not None:
            self._finish(reply)

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        try:
            reply = _parse(self._data, ended=True) if self._data else None
        except ValueError:
            reply = None
        if reply is not None and error is None:
            self._finish(reply)
        why = f" ({error})" if error is not None else ""
        kind = KeptEnded if self._has_answered and not self._data else ConnectionError
        self._fail(kind(f"it hung up after {len(self._data)} bytes of its answer{why}"))

    def _finish(self, parsed: tuple[int, bytes, bool]) -> None:
        status, body, self.reusable = parsed
        self._data = b""
        self._has_answered = True
        if self.reply is None:
            self.abort()  # an answer that nobody asked for
        elif not self.reply.done():
            self.reply.set_result((status, body))
        self.reply = None

    def _fail(self, error: ConnectionError) -> None:
        if self.reply is not None and not self.reply.done():
            self.reply.set_exception(error)
        self.reply = None


class Connections:
    """Connections to the server at ``url``, as many as there are requests at once."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ConfigError(f"the engine server {url!r}; expected http://host:port")
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (80 if self._ssl is None else 443)
        self._common = (
            f" HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: application/json\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._address: str | None = None

    async def request(self, method: str, path: str, body: bytes) -> Reply:
        """Status and body of the answer; OSError (ConnectionError) where there is none, KeptEnded
        where a new connection may do. A GET is sent once more on one."""
        kept = self._kept()
        if kept is not None:
            try:
                return await self._request_on(kept, method, path, body)
            except KeptEnded:
                self._drop_idle()  # which are older
                if method != "GET":
                    raise
        return await self._request_on(await self._connect(), method, path, body)

    def close(self) -> None:
        """Drop all; requests under way fail."""
        self._drop_idle()
        for connection in tuple(self._busy):
            connection.abort()

    async def _request_on(
        self, connection: Connection, method: str, path: str, body: bytes
    ) -> Reply:
        self._busy.add(connection)
        head = b"%s %s%s%d\r\n\r\n" % (method.encode(), path.encode(), self._common, len(body))
        try:
            reply = await connection.send(head, body)
        except BaseException:
            connection.abort()
            raise
        finally:
            self._busy.discard(connection)
        if connection.reusable:
            connection.idle_since_s = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.abort()
        return reply

    def _drop_idle(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle = []

    def _kept(self) -> Connection | None:
        """A connection that was used not long ago, the last of them."""
        if not self._idle:
            return None
        oldest_s = asyncio.get_running_loop().time() - KEEP_ALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since_s > oldest_s:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        """A new connection, to the address of the name that answered last; else to the first that
        does of all that it has (a server may listen on IPv4 alone where IPv6 comes first)."""
        loop = asyncio.get_running_loop()
        try:
            transport, connection = await loop.create_connection(
                Connection,
                self._address or self._host,
                self._port,
                ssl=self._ssl,
                server_hostname=None if self._ssl is None else self._host,
                happy_eyeballs_delay=None if self._address else _NEXT_ADDRESS_S,
            )
        except OSError:
            self._address = None  # the name may stand for another machine by now
            raise
        self._address = str(transport.get_extra_info("peername")[0])
        return connection


def allow_connections(number: int) -> None:
    """See to it that the process may open so many connections; ConfigError where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{number} requests in flight need {needed} open files, of which the system allows "
            f"{hard}: raise the hard limit (ulimit -Hn, limits.conf) or lower "
            "rollout.max_requests_per_server"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _parse(data: bytes, *, ended: bool = False) -> tuple[int, bytes, bool] | None:
    """(status, body, whether the connection may be used again); None where more is to come.

    ``ended``: nothing more will come. Raises ValueError for what is no HTTP/1.1 answer.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if not b"HTTP/1.".startswith(data[:7]) or len(data) > _MAX_HEAD_BYTES:
            raise ValueError(f"got {data[:40]!r}")
        return None
    if data[:7] != b"HTTP/1.":
        raise ValueError(f"got {data[:40]!r}")
    status = int(data[9:12])
    body_at = end + 4
    if 100 <= status < 200:
        return _parse(data[body_at:], ended=ended) if len(data) > body_at else None
    head = data[:end].lower() + b"\r\n"
    # uvicorn closes the connection after an error that the application did not catch, unannounced.
    lasting = data[7:8] == b"1" and status < 500
    reusable = lasting and b"\r\nconnection: close\r\n" not in head
    if (at := head.find(b"\r\ncontent-length:")) >= 0:
        size = int(head[at + 17 : head.index(b"\r\n", at + 2)])
        if len(data) < body_at + size:
            return None
        return status, data[body_at : body_at + size], reusable and len(data) == body_at + size
    if b"\r\ntransfer-encoding: chunked\r\n" in head:
        body = _unchunked(data, body_at)
        return None if body is None else (status, body, reusable)
    return (status, data[body_at:], False) if ended else None


def _unchunked(data: bytes, at: int) -> bytes | None:
    """The body whose chunks begin at ``at``; None where more is to come."""
    parts: list[bytes] = []
    while (end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:end].partition(b";")[0], 16)
        at = end + 2
        if len(data) < at + size + 2:
            return None
        if size == 0:
            return b"".join(parts)
        parts.append(data[at : at + size])
        at += size + 2
    return None
