"""The servers behind an sglang-router.

The fleet asks the router once who its workers are and then speaks to them itself: weights go to
each server in any case, a router does not know which servers hold the present ones, and the fleet
keeps sessions where their context is cached.
"""

import asyncio
from collections.abc import Sequence

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.http import JsonClient
from megatron_spear.rollout.engines.server import malformed


async def server_urls(urls: Sequence[str], *, deadline_s: float) -> list[str]:
    """``urls`` with each router's replaced by those of its workers, each once, in order.

    A URL that does not answer ``GET /workers`` is a server's, and kept, whether it is up or not.
    Raises EngineError for a router without workers.
    """
    found = await asyncio.gather(*(_behind(url, deadline_s) for url in urls))
    return list(dict.fromkeys(url for group in found for url in group))


async def _behind(url: str, deadline_s: float) -> list[str]:
    client = JsonClient(url, deadline_s=deadline_s)
    try:
        answer = await client.get("/workers")
    except EngineError:
        return [client.url]
    finally:
        await client.close()
    try:
        workers = [str(worker["url"]).rstrip("/") for worker in answer["workers"]]
    except (KeyError, TypeError):
        raise malformed(client.url, "/workers with no urls", answer) from None
    if not workers:
        raise EngineError(
            f"the router {client.url} has no workers; start servers and add them (POST /workers)"
        )
    return workers
