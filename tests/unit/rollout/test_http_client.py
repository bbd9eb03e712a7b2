"""JSON over HTTP: every way a server can fail is told apart, and none is waited for too long."""

import asyncio
import contextlib
import errno
import resource
import time

import pytest

from megatron_spear.errors import ConfigError, EngineError
from megatron_spear.rollout.engines import http_connection
from megatron_spear.rollout.engines.http import (
    JsonClient,
    RequestRefused,
    ServerBusy,
    ServerLate,
    ServerLost,
    Unanswered,
)


class RawServer:
    """Answers every request on a connection with the same bytes; None = never, b"" = hangs up."""

    def __init__(self, answer, *, then_close=False):
        self.answer, self.then_close = answer, then_close
        self.num_connections = 0
        self.requests = []

    async def serve(self, reader, writer):
        self.num_connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = [line for line in head.lower().split(b"\r\n") if b"content-length" in line]
                body = await reader.readexactly(int(size[0].split(b":")[1])) if size else b""
                self.requests.append((head.split(b" HTTP")[0].decode(), body))
                if self.answer is None:
                    await asyncio.sleep(60.0)
                writer.write(self.answer)
                await writer.drain()
                if self.then_close or not self.answer:
                    break
        writer.close()

    @contextlib.asynccontextmanager
    async def client(self, **settings):
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = JsonClient(f"http://127.0.0.1:{port}/", **{"deadline_s": 5.0, **settings})
        try:
            yield client
        finally:
            await client.close()
            server.close()


def answer(status, body, *, announced=None):
    size = len(body) if announced is None else announced
    return f"HTTP/1.1 {status} X\r\nContent-Length: {size}\r\n\r\n{body}".encode()


def post(server, **settings):
    async def once():
        async with server.client(**settings) as client:
            return await client.post("/generate", {"a": [1, 2]})

    return asyncio.run(once())


def test_an_answer_is_parsed_and_the_request_is_json():
    server = RawServer(answer(200, '{"x": [1, null]}'))
    assert post(server) == {"x": [1, None]}
    assert server.requests == [("POST /generate", b'{"a": [1, 2]}')]


def test_an_empty_body_is_none():
    assert post(RawServer(answer(200, ""))) is None


SHAPES = {
    '{"error": {"message": "input_ids cannot be empty."}}': "input_ids cannot be empty.",
    '{"error": "unknown field `foo`"}': "unknown field `foo`",
    '{"object": "error", "message": "no such field", "code": 400}': "no such field",
    '{"success": false, "message": "no session is open"}': "no session is open",
    '{"detail": "Not Found"}': "Not Found",
    '{"detail": [{"loc": ["body"]}]}': '[{"loc": ["body"]}]',
    "Flush cache failed.": "Flush cache failed.",
    "": "''",
}


@pytest.mark.parametrize(("body", "text"), SHAPES.items())
def test_a_refusal_says_what_the_server_says(body, text):
    with pytest.raises(RequestRefused) as error:
        post(RawServer(answer(400, body)))
    assert text in str(error.value) and " answered 400: " in str(error.value)
    assert "POST http://127.0.0.1:" in str(error.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_cannot_now_is_busy(status):
    with pytest.raises(ServerBusy, match=f"answered {status}: overloaded"):
        post(RawServer(answer(status, '{"error": {"message": "overloaded"}}')))


@pytest.mark.parametrize("status", [400, 404, 405, 422])
def test_a_wrong_request_is_refused(status):
    with pytest.raises(RequestRefused, match=f"answered {status}"):
        post(RawServer(answer(status, "{}")))


LOST = {
    "it hangs up": (b"", "hung up after 0 bytes"),
    "half a body": (answer(200, '{"x":', announced=4000), "hung up after .* bytes"),
    "half a head": (b"HTTP/1.1 200 OK\r\nConte", "hung up after 22 bytes"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "does not speak HTTP"),
    "no HTTP, without an end": (b"220 smtp ready\r\n", "does not speak HTTP"),
    "no length": (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "does not speak HTTP"),
    "no JSON": (answer(200, "<html>it works</html>"), "it works.*expected JSON"),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_server_that_gives_no_answer_is_lost(kind):
    sent, text = LOST[kind]
    with pytest.raises(ServerLost, match=f"(?s){text}"):
        post(RawServer(sent, then_close=True))


def test_a_refused_connection_is_a_lost_server():
    async def once():
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        client = JsonClient(f"http://127.0.0.1:{port}", deadline_s=5.0)
        try:
            await client.get("/model_info")
        finally:
            await client.close()

    with pytest.raises(ServerLost, match="start it again"):
        asyncio.run(once())


@pytest.mark.parametrize("where", ["client", "call"])
def test_no_answer_in_time_is_late(where):
    async def once():
        async with RawServer(None).client(deadline_s=0.1 if where == "client" else 60.0) as client:
            await client.get("/health", deadline_s=None if where == "client" else 0.1)

    started = time.monotonic()
    with pytest.raises(ServerLate, match=r"no answer within 0\.1 s"):
        asyncio.run(once())
    assert time.monotonic() - started < 2.0


def test_connections_are_kept_and_not_limited():
    async def many():
        server = RawServer(answer(200, "{}"))
        async with server.client() as client:
            for _ in range(5):
                await client.get("/")
            assert server.num_connections == 1
            await asyncio.gather(*(client.get("/") for _ in range(300)))
            return server.num_connections

    assert asyncio.run(many()) == 300


class Ending(RawServer):
    """Ends each connection after ``num_answers`` of it, without an answer to the next request."""

    def __init__(self, num_answers):
        super().__init__(answer(200, "{}"))
        self.num_answers = num_answers

    async def serve(self, reader, writer):
        self.num_connections += 1
        for count in range(self.num_answers + 1):
            try:
                await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            if count < self.num_answers:
                writer.write(self.answer)
        writer.close()


def test_a_kept_connection_that_ends_as_a_request_comes_is_replaced():
    async def run():
        server = Ending(1)
        async with server.client() as client:
            for _ in range(3):
                assert await client.get("/model_info") == {}
            first = server.num_connections
            with pytest.raises(Unanswered, match="hung up after 0 bytes"):
                await client.post_until_cancelled("/generate", b"")
            await client.post_until_cancelled("/generate", b"")
            return first, server.num_connections

    assert asyncio.run(run()) == (3, 4)


def test_a_new_connection_that_ends_is_a_lost_server():
    async def run():
        server = Ending(0)
        async with server.client() as client:
            with pytest.raises(ServerLost, match="hung up after 0 bytes") as error:
                await client.get("/model_info")
            return type(error.value), server.num_connections

    assert asyncio.run(run()) == (ServerLost, 1)


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch):
    limits = [100, 2000]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.__setitem__(0, new[0]))
    http_connection.allow_connections(1000)
    assert 1000 < limits[0] <= 2000
    raised = limits[0]
    http_connection.allow_connections(10)
    assert limits[0] == raised
    with pytest.raises(ConfigError, match=r"2000 requests in flight.*ulimit -Hn"):
        http_connection.allow_connections(2000)


def test_running_out_of_files_is_not_the_servers_fault(monkeypatch):
    async def none_left(connections):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(http_connection.Connections, "_connect", none_left)
    with pytest.raises(EngineError, match=r"failed on our side.*ulimit -n") as error:
        post(RawServer(answer(200, "{}")))
    assert not isinstance(error.value, ServerLost)


def test_an_idle_connection_is_given_up_before_the_server_does(monkeypatch):
    monkeypatch.setattr(http_connection, "KEEP_ALIVE_S", 0.05)

    async def idle():
        server = RawServer(answer(200, "{}"))
        async with server.client() as client:
            await client.get("/")
            await asyncio.sleep(0.2)
            await client.get("/")
            return server.num_connections

    assert asyncio.run(idle()) == 2


def test_connections_are_given_up_before_uvicorn_does():
    assert http_connection.KEEP_ALIVE_S < 5.0


CHUNKED = (
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{"a"\r\n5;x=y\r\n: 12}\r\n0\r\n\r\n'
)
FORMS = {
    "a length": answer(200, '{"a": 12}'),
    "chunks": CHUNKED,
    "an interim answer first": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(200, '{"a": 12}'),
    "the end of the connection": b'HTTP/1.1 200 OK\r\n\r\n{"a": 12}',
    "HTTP/1.0": b'HTTP/1.0 200 OK\r\nCONTENT-LENGTH:9\r\n\r\n{"a": 12}',
}


@pytest.mark.parametrize("piece_bytes", [1, 7, 10**6])
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_in_any_form_and_in_any_pieces(form, piece_bytes):
    class Pieces(RawServer):
        async def serve(self, reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            for at in range(0, len(self.answer), piece_bytes):
                writer.write(self.answer[at : at + piece_bytes])
                await writer.drain()
                await asyncio.sleep(0)
            if form == "the end of the connection":
                writer.close()
            else:
                await reader.read()
                writer.close()

    assert post(Pieces(FORMS[form])) == {"a": 12}


ENDING = {
    "HTTP/1.0": FORMS["HTTP/1.0"],
    "closing": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
    "an error that uvicorn hangs up after": answer(500, "Internal Server Error"),
}


@pytest.mark.parametrize("form", ENDING)
def test_a_connection_that_the_server_ends_is_not_used_again(form):
    server = RawServer(ENDING[form])

    async def twice():
        async with server.client() as client:
            for _ in range(2):
                with contextlib.suppress(ServerBusy):
                    await client.get("/")

    asyncio.run(twice())
    assert server.num_connections == 2


def test_a_large_request_arrives_whole():
    server = RawServer(answer(200, "{}"))

    async def once():
        async with server.client() as client:
            await client.post("/", {"x": "y" * (3 << 20)})

    asyncio.run(once())
    assert len(server.requests[0][1]) == (3 << 20) + len('{"x": ""}')


def test_a_cancelled_request_does_not_leave_its_answer_to_the_next():
    slow = RawServer(answer(200, '{"a": 1}'))

    async def run():
        async with slow.client() as client:
            await client.get("/")
            slow.answer = None
            with pytest.raises(ServerLate):
                await client.get("/", deadline_s=0.05)
            slow.answer = answer(200, '{"a": 2}')
            return await client.get("/")

    assert asyncio.run(run()) == {"a": 2} and slow.num_connections == 2


def test_a_request_that_is_given_up_is_hung_up_on():
    class Silent(RawServer):
        async def serve(self, reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
            self.gone.set()
            writer.close()

    async def run():
        server = Silent(None)
        server.gone = asyncio.Event()
        async with server.client() as client:
            with pytest.raises(ServerLate):
                await client.get("/", deadline_s=0.05)
            await asyncio.wait_for(server.gone.wait(), 2.0)

    asyncio.run(run())


@pytest.mark.parametrize("url", ["localhost:3000", "ftp://host:1", "http://host:1/v1", "http://"])
def test_a_url_that_is_none_is_a_config_error(url):
    with pytest.raises(ConfigError, match="expected http://host:port"):
        JsonClient(url, deadline_s=1.0)
