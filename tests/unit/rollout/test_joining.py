"""Servers that come and go while a fleet is at work."""

import asyncio
import contextlib
import time

from fleet_cases import VOCAB, ask, limits, sglang, until, update

from megatron_spear.rollout.engines.fleet import Fleet
from megatron_spear.rollout.engines.joining import Joining
from megatron_spear.testing.fake_sglang import FakeSGLang


class Scene:
    """A fleet over the servers of a list that tests change."""

    def __init__(self) -> None:
        self.fakes: list[FakeSGLang] = []
        self.listed: list[str] = []
        self.unreadable = False

    async def server(self, **settings) -> FakeSGLang:
        fake = FakeSGLang(vocab_size=VOCAB, **settings)
        await self.start(fake)
        return fake

    async def start(self, fake: FakeSGLang) -> None:
        await fake.start()
        self.fakes.append(fake)

    async def kill(self, fake: FakeSGLang) -> None:
        self.fakes.remove(fake)
        await fake.kill()

    def urls(self) -> list[str]:
        if self.unreadable:
            raise OSError("stale file handle")
        return list(self.listed)

    @contextlib.asynccontextmanager
    async def fleet(self, *first: FakeSGLang):
        self.listed = [fake.url for fake in first]
        fleet = Fleet(
            [sglang(url) for url in self.listed],
            vocab_size=VOCAB,
            limits=limits(),
            joining=Joining(self.urls, sglang),
        )
        await fleet.start(wait_s=2.0)
        await update(fleet, 1)
        try:
            yield fleet
        finally:
            await fleet.close()
            for fake in self.fakes:
                await fake.kill()


def names(fleet):
    return [member.name for member in fleet.roster.members]


def serving(fleet):
    return [member.name for member in fleet.roster.members if member.out is None]


def test_a_server_that_is_listed_later_joins_at_the_next_update_with_all_weights():
    async def live():
        scene = Scene()
        one = await scene.server()
        async with scene.fleet(one) as fleet:
            two = await scene.server()
            scene.listed.append(two.url)
            await fleet.generate(ask())
            assert serving(fleet) == [one.url], "not before an update"
            await update(fleet, 2, "new")
            assert serving(fleet) == [one.url, two.url]
            assert two.bodies("/update_weights_from_disk")[-1]["model_path"] == "new"
            await asyncio.gather(*(fleet.generate(ask(number)) for number in range(8)))
            assert one.bodies("/generate") and two.bodies("/generate")

    asyncio.run(live())


def test_a_server_that_is_started_again_elsewhere_replaces_its_former_self():
    async def live():
        scene = Scene()
        stays, dies = await scene.server(), await scene.server()
        async with scene.fleet(stays, dies) as fleet:
            await scene.kill(dies)
            await until(lambda: dies.url not in serving(fleet))
            again = await scene.server()
            scene.listed = [stays.url, again.url]
            await update(fleet, 2)
            assert names(fleet) == serving(fleet) == [stays.url, again.url]
            assert {member.version for member in fleet.roster.members} == {2}
            for number in range(4):
                await fleet.generate(ask(number))

    asyncio.run(live())


def test_a_server_that_serves_stays_when_its_entry_cannot_be_read():
    async def live():
        scene = Scene()
        one, two = await scene.server(), await scene.server()
        async with scene.fleet(one, two) as fleet:
            scene.listed = [two.url]  # the entry of the first is half written
            await update(fleet, 2)
            assert serving(fleet) == [one.url, two.url]
            scene.unreadable = True
            await update(fleet, 3)
            assert serving(fleet) == [one.url, two.url]

    asyncio.run(live())


def test_one_that_does_not_answer_costs_an_update_little_and_joins_later():
    async def live():
        scene = Scene()
        one = await scene.server()
        async with scene.fleet(one) as fleet:
            late = await scene.server()
            url = late.url
            await scene.kill(late)
            scene.listed.append(url)
            began = time.monotonic()
            await update(fleet, 2)
            assert time.monotonic() - began < 1.0
            assert serving(fleet) == [one.url]
            await scene.start(late)
            await until(lambda: any(m.reachable for m in fleet.roster.members if m.name == url))
            await update(fleet, 3)
            assert serving(fleet) == [one.url, url]

    asyncio.run(live())


def test_one_with_less_context_than_the_others_does_not_join():
    async def live():
        scene = Scene()
        one = await scene.server(max_context=64)
        async with scene.fleet(one) as fleet:
            small = await scene.server(max_context=32)
            scene.listed.append(small.url)
            await update(fleet, 2)
            assert serving(fleet) == [one.url]
            assert "its context of 32 tokens is below the 64" in fleet.roster.situation()

    asyncio.run(live())


def test_one_that_is_forgotten_is_looked_at_no_more():
    async def live():
        scene = Scene()
        one, dies = await scene.server(), await scene.server()
        async with scene.fleet(one, dies) as fleet:
            await scene.kill(dies)
            await until(lambda: dies.url not in serving(fleet))
            scene.listed = [one.url]
            await update(fleet, 2)
            assert names(fleet) == [one.url]
            calls = []
            again = await asyncio.start_server(
                lambda reader, writer: calls.append(writer.close()), "127.0.0.1", dies.port
            )
            await asyncio.sleep(0.3)
            again.close()
            assert calls == []

    asyncio.run(live())
