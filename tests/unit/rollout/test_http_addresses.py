"""A server's name may have several addresses, of which it listens on one."""

import asyncio
import contextlib
import socket

import pytest

from megatron_spear.rollout.engines.http import JsonClient, ServerLost

SILENT = "192.0.2.1"
"""An address of documentation, RFC 5737: nobody answers there."""


async def one_answer(reader, writer):
    with contextlib.suppress(asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"weight_version": "x"}'
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
    writer.close()


@contextlib.asynccontextmanager
async def named_server(*addresses):
    """A server on 127.0.0.1 whose name stands for these addresses; its client, and the addresses
    that were looked up or tried."""
    server = await asyncio.start_server(one_answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    loop, log = asyncio.get_running_loop(), []
    resolve, connect = loop.getaddrinfo, loop.sock_connect

    async def getaddrinfo(host, port, **settings):
        if host != "node7":
            return await resolve(host, port, **settings)
        log.append(host)
        return [
            (socket.AF_INET6, 1, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, 1, 6, "", (address, port))
            for address in addresses
        ]

    async def sock_connect(sock, address):
        log.append(address[0])
        if address[0] == SILENT:
            await asyncio.sleep(60.0)
        await connect(sock, address)

    loop.getaddrinfo, loop.sock_connect = getaddrinfo, sock_connect
    client = JsonClient(f"http://node7:{port}", deadline_s=5.0)
    try:
        yield client, log
    finally:
        await client.close()
        server.close()


@pytest.mark.parametrize("first", ["::1", "127.0.0.2", SILENT])
def test_each_address_is_tried_and_the_one_that_answered_is_kept(first):
    async def run():
        async with named_server(first, "127.0.0.1") as (client, log):
            answers = [await client.get("/model_info") for _ in range(3)]
            return answers, log

    answers, log = asyncio.run(run())
    assert answers == [{"weight_version": "x"}] * 3
    # A machine without IPv6 fails at the socket already, before it connects.
    assert [entry for entry in log if entry != "::1"] == [
        "node7",
        *([] if first == "::1" else [first]),
        *["127.0.0.1"] * 3,
    ]


def test_a_name_is_looked_up_again_after_a_failure():
    async def run():
        addresses = ["127.0.0.2"]
        async with named_server(*addresses) as (client, log):
            for _ in range(2):
                with pytest.raises(ServerLost, match=r"ConnectionRefused.*127\.0\.0\.2"):
                    await client.get("/model_info")
            return log

    assert asyncio.run(run()) == ["node7", "127.0.0.2"] * 2
