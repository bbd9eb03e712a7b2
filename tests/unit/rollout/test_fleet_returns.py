"""A server that was lost serves again where its label proves that it kept its weights."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from fleet_cases import (
    PROMPT,
    VOCAB,
    fleet_over,
    greedy,
    greedy_tokens,
    limits,
    sglang,
    until,
    update,
)

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.fleet import Fleet
from megatron_spear.rollout.engines.fleet_memory import FleetMemory
from megatron_spear.rollout.engines.fleet_updates import FleetUpdates
from megatron_spear.rollout.engines.http import ServerLate, ServerLost
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.testing.fake_sglang import FakeSGLang
from megatron_spear.types import VersionSpan


async def checked(member):
    """Wait until health checks have found that a server answers again, and one or two more."""
    await until(lambda: member.reachable)
    await asyncio.sleep(0.1)


def test_a_dropped_connection_does_not_end_the_only_server():
    async def run():
        async with fleet_over(1, all_out_s=2.0) as (fleet, (fake,)):
            fake.faults += ["drop"] * 2
            answers = await asyncio.gather(*(fleet.generate(greedy(i)) for i in range(4)))
            return answers, fleet.roster.members[0].out

    answers, out = asyncio.run(run())
    for answer in answers:
        assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 8)
        assert answer.versions == (VersionSpan(1, 8),)
    assert out is None


def test_a_kept_connection_that_ends_costs_nothing():
    async def run():
        async with fleet_over(1, probe_s=60.0, max_tries=1) as (fleet, (fake,)):
            await fleet.generate(greedy())
            fake.faults.append("drop")
            answer = await fleet.generate(greedy(1))
            return answer, fleet.roster.members[0].out, fake.bodies("/generate")

    answer, out, asked = asyncio.run(run())
    assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 8) and out is None
    assert len({body["rid"] for body in asked}) == len(asked) == 3


def test_a_server_that_did_not_answer_serves_again_once_it_does():
    async def run():
        async with fleet_over(1, all_out_s=5.0) as (fleet, (fake,)):
            (member,) = fleet.roster.members

            async def late():
                raise ServerLate("no answer")

            member.server.label = late
            await until(lambda: member.out is not None)
            going = asyncio.create_task(fleet.generate(greedy()))
            await asyncio.sleep(0.05)
            assert not fake.bodies("/generate")
            del member.server.label
            return await going, member.out

    answer, out = asyncio.run(run())
    assert answer.versions == (VersionSpan(1, 8),) and out is None


def test_a_server_that_was_restarted_is_not_taken_back():
    async def run():
        async with fleet_over(2) as (fleet, fakes):
            member = fleet.roster.members[0]
            await fakes[0].kill()
            await until(lambda: member.out is not None)
            await fakes[0].start()
            await checked(member)
            why = member.out
            fakes[0].label = fleet.labels.label(1)  # whoever says so now, it is not believed
            await asyncio.sleep(0.2)
            still = member.out
            await update(fleet, 2)
            return why, still, member.out

    why, still, out = asyncio.run(run())
    assert "holds the weights 'default'" in why
    assert still == why and out is None


def test_a_server_that_missed_an_update_while_it_was_lost_is_not_taken_back():
    async def run():
        async with fleet_over(2) as (fleet, fakes):
            one, two = fleet.roster.members
            await fleet.pause("retract")
            fleet.roster.lose(one, "reset")
            await two.server.load_folder("new", fleet.labels.label(2))
            await fleet.admit(two, 2)
            await fleet.resume()
            await checked(one)
            return one.out, fakes[0].label == fleet.labels.label(1)

    assert asyncio.run(run()) == ("reset", True)


def test_nobody_is_taken_back_in_a_pause():
    async def run():
        async with fleet_over(1) as (fleet, (fake,)):
            (member,) = fleet.roster.members
            await fleet.pause("retract")
            fleet.roster.lose(member, "reset")
            await checked(member)
            out = member.out
            await fleet.resume()
            return out, (await fleet.generate(greedy())).versions, fake.paused

    assert asyncio.run(run()) == ("reset", (VersionSpan(1, 8),), None)


def test_a_server_that_could_not_be_told_to_go_on_is_told_again():
    async def run():
        async with fleet_over(1) as (fleet, (fake,)):
            (member,) = fleet.roster.members
            resume, tried = member.server.resume, []

            async def fails_first():
                tried.append(fake.paused)
                if len(tried) == 1:
                    raise ServerLost("reset")
                await resume()

            member.server.resume = fails_first
            await fleet.pause("retract")
            await update(fleet, 2)
            await fleet.resume()
            out = member.out
            return out, (await fleet.generate(greedy())).versions, tried

    out, versions, tried = asyncio.run(run())
    assert "did not go on" in out and versions == (VersionSpan(2, 8),)
    assert tried == ["retract", "retract"]


def test_a_server_that_answers_no_request_is_taken_back_ever_later():
    async def run():
        limited = {"probe_s": 0.1, "all_out_s": 5.0, "max_tries": 4}
        async with fleet_over(1, **limited) as (fleet, (fake,)):
            fake.faults += ["drop"] * 20
            started = time.monotonic()
            with pytest.raises(EngineError, match=r"failed 4 times.*hung up"):
                await fleet.generate(greedy())
            return time.monotonic() - started

    # Rests of 0, 0.1 and 0.3 s; without them three health checks, 0.3 s at most.
    assert asyncio.run(run()) > 0.4


def test_a_request_pays_no_try_for_what_another_met():
    async def run():
        async with fleet_over(2, step_s=0.01, max_tries=1) as (fleet, fakes):
            going = [asyncio.create_task(fleet.generate(greedy(i, new=10))) for i in range(4)]
            await until(lambda: all(fake.num_running == 2 for fake in fakes))
            fleet.roster.lose(fleet.roster.members[0], "reset")
            return await asyncio.gather(*going)

    for answer in asyncio.run(run()):
        assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 10)


@pytest.fixture(scope="module")
def world():
    """A fleet of one server on an event loop, for tests that speak to it from their own thread."""
    with EventLoop("fleet") as loop:
        fake = FakeSGLang(vocab_size=VOCAB)
        loop.run(fake.start())
        fleet = Fleet([sglang(fake.url)], vocab_size=VOCAB, limits=limits(all_out_s=60.0))
        loop.run(fleet.start(wait_s=2.0))
        yield SimpleNamespace(
            loop=loop,
            fleet=fleet,
            fake=fake,
            member=fleet.roster.members[0],
            updates=FleetUpdates(fleet, loop, "retract"),
            memory=FleetMemory(fleet, loop),
        )
        loop.run(fleet.close())
        loop.run(fake.kill())


def lost_alone(world, server):
    pass


def update_begun(world, server):
    server.begin_update().result(5.0)


def payload_received(world, server):
    world.fake.in_update = True
    server.receive_payloads([b"x"], None, world.fleet.policy_version + 1).result(5.0)


def update_taken_up_and_lost(world, server):
    async def reset(folder, label):
        raise ServerLost("reset")

    server.member.server.load_folder = reset
    with pytest.raises(ServerLost):
        server.load_folder("new", world.fleet.policy_version + 1).result(5.0)
    del server.member.server.load_folder


def memory_released(world, server):
    world.memory.release()


def version_refused(world, server):
    with pytest.raises(EngineError, match="only go up"):
        server.end_update(world.fleet.policy_version).result(5.0)


@pytest.mark.parametrize(
    ("before", "returns"),
    [
        (lost_alone, True),
        (version_refused, True),
        (update_begun, False),
        (payload_received, False),
        (update_taken_up_and_lost, False),
        (memory_released, False),
    ],
)
def test_only_a_server_with_whole_weights_is_taken_back(world, before, returns):
    """Its label does not tell: it is changed when an update ends."""
    member, version = world.member, world.fleet.policy_version + 1

    def bring(version):
        (server,) = world.updates.reachable()
        server.load_folder("weights", version).result(5.0)
        world.updates.admit(server, version)
        return server

    before(world, bring(version))
    assert world.fake.label == world.fleet.labels.label(version)

    async def lose():
        world.fleet.roster.lose(member, "reset")
        await checked(member)
        return member.out

    assert world.loop.run(lose()) == (None if returns else "reset")
    world.fake.in_update = False
    bring(version + 1)
    assert member.out is None


def test_a_server_whose_update_failed_is_not_taken_back(world):
    (server,) = world.updates.reachable()
    server.load_folder("weights", world.fleet.policy_version + 1).result(5.0)
    world.updates.admit(server, world.fleet.policy_version + 1)
    world.updates.take_out(server, "it failed an update")
    world.loop.run(checked(world.member))
    assert world.member.out == "it failed an update"
