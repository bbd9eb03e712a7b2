"""Servers that join a fleet, and leave it, while a run goes on."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_spear.errors import ConfigError
from megatron_spear.rollout.engines.dispatch import Member
from megatron_spear.rollout.engines.http_connection import allow_connections
from megatron_spear.rollout.engines.probing import Prober
from megatron_spear.rollout.engines.server import EngineServer

_LOG = logging.getLogger(__name__)

_LIST_S = 30.0
"""Longest wait for the list, which may lie on a file system of many machines."""


@dataclass(frozen=True, slots=True)
class Joining:
    """``list_urls`` names the servers that there are when it is called, ``new_server`` makes the
    client of one.

    A server that was started again at another address is a new one; its former self, which is out,
    is forgotten. One that serves stays although the list lacks it: that says that its entry cannot
    be read now, and if it is gone, requests and health checks tell.
    """

    list_urls: Callable[[], Sequence[str]]
    new_server: Callable[[str], EngineServer]

    async def follow(self, members: list[Member], prober: Prober, max_requests: int) -> None:
        """Bring ``members`` in line with the list; new ones are to be probed before all else.

        ``max_requests`` is the number of connections that each needs. Nothing changes where the
        list cannot be had.
        """
        try:
            urls = await asyncio.wait_for(asyncio.to_thread(self.list_urls), _LIST_S)
        except (OSError, TimeoutError) as error:
            _LOG.warning("the list of engine servers cannot be read now: %r", error)
            return
        for member in [m for m in members if m.out is not None and m.name not in urls]:
            members.remove(member)
            await prober.forget(member)
            await member.server.close()
            _LOG.info("engine %s is forgotten, it is not listed any more", member.name)
        new = [url for url in urls if all(member.name != url for member in members)]
        try:
            allow_connections(max_requests * (len(members) + len(new)))
        except ConfigError as error:
            _LOG.warning("engines %s cannot join: %s", ", ".join(new), error)
            return
        for url in new:
            member = Member(self.new_server(url))
            members.append(member)
            prober.look_after(member)
            _LOG.info("engine %s joins", url)
