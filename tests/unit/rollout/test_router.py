"""A router's URL stands for its workers'."""

import asyncio

import pytest
from aiohttp import web

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.router import server_urls
from megatron_spear.testing.fake_sglang import FakeSGLang

WORKERS = [{"id": "a", "url": "http://w1:1/"}, {"id": "b", "url": "http://w2:2"}]


def found(answer, *others):
    """What is found behind a router that gives ``answer``, a server, a dead URL and ``others``."""

    async def run():
        app = web.Application()
        app.router.add_get("/workers", lambda request: web.json_response(answer))
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server = FakeSGLang()
        await server.start()
        dead = "http://127.0.0.1:9"
        urls = [f"http://127.0.0.1:{runner.addresses[0][1]}", f"{server.url}/", dead, *others]
        try:
            return await server_urls(urls, deadline_s=5.0), server.url, dead
        finally:
            await server.kill()
            await runner.cleanup()

    return asyncio.run(run())


def test_workers_servers_and_those_that_are_down():
    urls, server, dead = found({"workers": WORKERS, "total": 2}, "http://127.0.0.1:9")
    assert urls == ["http://w1:1", "http://w2:2", server, dead]


@pytest.mark.parametrize(
    ("answer", "text"),
    [({"workers": []}, "has no workers"), ({"workers": [1]}, "no urls"), ([], "no urls")],
)
def test_a_router_that_names_none(answer, text):
    with pytest.raises(EngineError, match=text):
        found(answer)
