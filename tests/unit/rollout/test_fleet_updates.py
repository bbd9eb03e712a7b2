"""Weights come and go: pauses, versions, labels, servers that return, two trainers."""

import asyncio

import pytest
import torch
from fleet_cases import (
    PROMPT,
    VOCAB,
    ask,
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
from megatron_spear.rollout.engines.fleet_updates import FleetUpdates
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.testing.engines import check_engine
from megatron_spear.testing.fake_sglang import FakeSGLang
from megatron_spear.types import VersionSpan
from megatron_spear.weight_sync.servers import (
    GroupAddress,
    TensorSpec,
    UpdateServer,
    UpdateServers,
)


async def updated_in_the_middle(mode, weights):
    """One generation of 20 tokens, with an update after some; what its server was asked."""
    async with fleet_over(1, step_s=0.01) as (fleet, (fake,)):
        going = asyncio.create_task(fleet.generate(greedy(new=20)))
        await until(lambda: fake.num_running == 1)
        await asyncio.sleep(0.05)
        await fleet.pause(mode)
        late = asyncio.create_task(fleet.generate(greedy(1, new=2)))
        await update(fleet, 2, weights)
        await asyncio.sleep(0.02)
        assert not late.done() and not going.done()
        await fleet.resume()
        return await going, await late, fake


def test_retract_goes_on_with_the_new_weights():
    answer, late, _ = asyncio.run(updated_in_the_middle("retract", "new"))
    (old, before), (new, after) = answer.versions
    assert (old, new, before + after) == (1, 2, 20) and before > 0 and after > 0
    first = greedy_tokens(PROMPT, before)
    assert answer.token_ids.tolist() == first + greedy_tokens([*PROMPT, *first], after, "new")
    assert late.versions == (VersionSpan(2, 2),)


def test_abort_draws_again_from_the_beginning():
    answer, _, fake = asyncio.run(updated_in_the_middle("abort", "new"))
    assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 20, "new")
    assert answer.versions == (VersionSpan(2, 20),)
    mine = [b for b in fake.bodies("/generate") if b["session_id"] == "session 0"]
    assert len(mine) == 2 and mine[0]["input_ids"] == mine[1]["input_ids"]


def test_many_pauses_do_not_use_up_the_tries():
    async def run():
        async with fleet_over(1, step_s=0.01, max_tries=2) as (fleet, (fake,)):
            going = asyncio.create_task(fleet.generate(greedy(new=10)))
            for version in range(2, 7):
                tries = version - 1
                await until(lambda tries=tries: len(fake.bodies("/generate")) == tries)
                await fleet.pause("abort")
                await update(fleet, version)
                await fleet.resume()
            return await going

    assert asyncio.run(run()).versions == (VersionSpan(6, 10),)


def test_a_server_that_returns_with_old_weights_serves_after_an_update_only():
    async def run():
        async with fleet_over(2) as (fleet, fakes):
            member = fleet.roster.members[0]
            await fakes[0].kill()
            await until(lambda: member.out is not None)
            await fakes[0].start()
            await until(lambda: member.reachable)
            await asyncio.gather(*(fleet.generate(ask(i)) for i in range(8)))
            away = len(fakes[0].bodies("/generate"))
            await update(fleet, 2)
            answers = await asyncio.gather(*(fleet.generate(ask(i)) for i in range(8, 16)))
            return away, len(fakes[0].bodies("/generate")), answers

    away, back, answers = asyncio.run(run())
    assert away == 0 and back == 4
    assert {answer.versions for answer in answers} == {(VersionSpan(2, 8),)}


def test_a_quick_restart_is_found_by_the_label_of_an_answer():
    """Between two health checks: nothing but the answer says that the weights are the old ones."""

    async def run():
        async with fleet_over(2, probe_s=60.0) as (fleet, fakes):
            await fakes[0].kill()
            await fakes[0].start()
            fakes[0].step_s = fakes[1].step_s = 0.005
            answers = await asyncio.gather(*(fleet.generate(greedy(i)) for i in range(4)))
            return answers, fleet.roster.members[0].out

    answers, out = asyncio.run(run())
    assert "holds the weights 'default'" in out
    for answer in answers:
        assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 8)
        assert answer.versions == (VersionSpan(1, 8),)


def test_a_health_check_finds_old_weights_of_our_own():
    async def run():
        async with fleet_over(2) as (fleet, fakes):
            await update(fleet, 5)
            fakes[0].label = fleet.labels.label(4)
            member = fleet.roster.members[0]
            await until(lambda: member.out is not None)
            return member.out

    assert "policy version 4 after it had been given 5" in asyncio.run(run())


def test_an_answer_with_old_weights_of_our_own_is_not_taken():
    async def run():
        async with fleet_over(2, probe_s=60.0) as (fleet, fakes):
            await update(fleet, 5)
            fakes[0].label = fleet.labels.label(4)
            answers = await asyncio.gather(*(fleet.generate(greedy(i)) for i in range(4)))
            return answers, fleet.roster.members[0].out

    answers, out = asyncio.run(run())
    assert "policy version 4 after it had been given 5" in out
    assert {answer.versions for answer in answers} == {(VersionSpan(5, 8),)}


def test_two_trainers_on_one_server():
    """The second takes it over; the first says so, and leaves it alone from then on."""

    async def run():
        async with (
            fleet_over(1, launch="aaaaaaaa", all_out_s=0.2) as (first, fakes),
            fleet_over(fakes=fakes, launch="bbbbbbbb", version=1) as (second, _),
        ):
            with pytest.raises(EngineError, match=r"bbbbbbbb/1' of another.*servers of its own"):
                await first.generate(ask())
            assert await first.reachable() == []
            answer = await second.generate(greedy())
            await update(first, 2)
            assert fakes[0].label == "bbbbbbbb/1" and second.roster.members[0].out is None
            return answer

    assert asyncio.run(run()).versions == (VersionSpan(1, 8),)


def test_what_an_earlier_run_left_behind_is_taken():
    async def run():
        async with fleet_over(1, version=None, launch="aaaaaaaa") as (fleet, (fake,)):
            fake.label = "bbbbbbbb/900"
            await update(fleet, 1)
            return await fleet.generate(greedy())

    assert asyncio.run(run()).versions == (VersionSpan(1, 8),)


def test_versions_only_go_up():
    async def run():
        async with fleet_over(1, version=3) as (fleet, _):
            for version in (3, 2):
                with pytest.raises(EngineError, match=r"given 3 .*versions only go up"):
                    await fleet.admit(fleet.roster.members[0], version)
            await fleet.admit(fleet.roster.members[0], 4)

    asyncio.run(run())


def test_a_server_that_missed_an_update_is_out_after_the_pause():
    async def run():
        async with fleet_over(2) as (fleet, fakes):
            await fleet.pause("retract")
            left = fleet.roster.members[0]
            await left.server.load_folder("new", fleet.labels.label(2))
            await fleet.admit(left, 2)
            await fleet.resume()
            answers = await asyncio.gather(*(fleet.generate(greedy(i)) for i in range(4)))
            return answers, fleet.roster.members[1].out, fakes[1].paused

    answers, out, paused = asyncio.run(run())
    assert out == "it did not get policy version 2" and paused is None
    assert {answer.versions for answer in answers} == {(VersionSpan(2, 8),)}


def test_requests_on_a_server_whose_update_failed_are_drawn_elsewhere():
    """Its weights may be half new: nothing it still says is taken."""

    async def run():
        async with fleet_over(2, step_s=0.01) as (fleet, fakes):
            going = [asyncio.create_task(fleet.generate(greedy(i, new=10))) for i in range(4)]
            await until(lambda: all(fake.num_running == 2 for fake in fakes))
            fakes[0].weights = "half new"
            fleet.roster.take_out(fleet.roster.members[0], "it failed an update")
            answers = await asyncio.gather(*going)
            await until(lambda: len(fakes[0].bodies("/abort_request")) == 2)
            return answers

    for answer in asyncio.run(run()):
        assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 10)


def test_a_server_that_dies_in_a_pause_does_not_hold_up_the_rest():
    async def run():
        async with fleet_over(2) as (fleet, fakes):
            await fakes[0].kill()
            await fleet.pause("retract")
            await update(fleet, 2)
            await fleet.resume()
            answer = await fleet.generate(greedy())
            await fakes[0].start()
            return answer, fleet.roster.members[0].out

    answer, out = asyncio.run(run())
    assert answer.versions == (VersionSpan(2, 8),) and "did not pause" in out


def test_all_servers_out_wait_for_the_update_that_is_under_way():
    async def run():
        async with fleet_over(1, all_out_s=0.1) as (fleet, _):
            await fleet.pause("retract")
            fleet.roster.take_out(fleet.roster.members[0], "for a while")
            going = asyncio.create_task(fleet.generate(greedy()))
            await asyncio.sleep(0.3)
            await update(fleet, 2)
            await fleet.resume()
            return await going

    assert asyncio.run(run()).versions == (VersionSpan(2, 8),)


@pytest.fixture(scope="module")
def loop():
    with EventLoop("fleet") as running:
        yield running


class Ensemble:
    """A fleet on an event loop, for tests that speak to it from their own thread."""

    def __init__(self, loop, num_servers=2, version=1, **settings):
        self.loop = loop
        self.fakes = [FakeSGLang(vocab_size=VOCAB, **settings) for _ in range(num_servers)]
        for fake in self.fakes:
            loop.run(fake.start())
        servers = [sglang(fake.url) for fake in self.fakes]
        self.fleet = Fleet(servers, vocab_size=VOCAB, limits=limits(deadline_s=20.0))
        loop.run(self.fleet.start(wait_s=2.0))
        self.updates = FleetUpdates(self.fleet, loop, "retract")
        if version is not None:
            self.bring(version)

    def bring(self, version, weights="weights"):
        for server in self.updates.reachable():
            server.load_folder(weights, version).result(5.0)
            self.updates.admit(server, version)

    def close(self):
        self.loop.run(self.fleet.close())
        for fake in self.fakes:
            self.loop.run(fake.kill())


@pytest.fixture
def ensemble(loop):
    made = Ensemble(loop)
    yield made
    made.close()


def test_a_fleet_keeps_to_the_engine_contract(loop):
    made = []

    def make():
        made.append(Ensemble(loop, step_s=0.004))
        return made[-1].fleet

    def bring(fleet, version):
        next(e for e in made if e.fleet is fleet).bring(version)

    check_engine(loop, make, update=bring)
    for ensemble in made:
        ensemble.close()


def test_an_update_from_the_training_thread(ensemble):
    updates: UpdateServers = ensemble.updates
    servers: list[UpdateServer] = list(updates.reachable())
    assert [(s.name, s.num_ranks) for s in servers] == [(f.url, 1) for f in ensemble.fakes]
    assert "model.norm.weight" in servers[0].parameter_names().result(5.0)
    spec = TensorSpec(name="a", shape=(2,), dtype=torch.float32)
    group = GroupAddress(host="h", port=1, name="g", backend="gloo", world_size=3)
    updates.pause()
    assert [fake.paused for fake in ensemble.fakes] == ["retract"] * 2
    for rank, server in enumerate(servers):
        server.join_group(group, 1 + rank).result(5.0)
        server.begin_update().result(5.0)
        server.receive_broadcast([spec], "g", 2).result(5.0)
        server.receive_payloads([b"x"], None, 2).result(5.0)
        server.end_update(2).result(5.0)
        updates.admit(server, 2)
        server.leave_group("g").result(5.0)
    updates.resume()
    assert ensemble.fleet.policy_version == 2
    assert [fake.paused for fake in ensemble.fakes] == [None, None]
    answer = ensemble.loop.run(ensemble.fleet.generate(ask()))
    assert answer.versions == (VersionSpan(2, 8),)
    ranks = [fake.bodies("/init_weights_update_group")[0]["rank_offset"] for fake in ensemble.fakes]
    assert ranks == [1, 2]


def test_a_version_the_server_has_had_is_refused(ensemble):
    server = ensemble.updates.reachable()[0]
    for later in (server.load_folder("w", 1), server.end_update(1)):
        with pytest.raises(EngineError, match="versions only go up"):
            later.result(5.0)


def test_a_server_is_taken_out_and_comes_back_with_the_next_update(ensemble):
    first = ensemble.updates.reachable()[0]
    assert first.serving
    ensemble.updates.take_out(first, "it was late")
    assert not first.serving
    assert ensemble.fleet.roster.members[0].out == "it was late"
    assert [server.name for server in ensemble.updates.reachable()] == [
        fake.url for fake in ensemble.fakes
    ]
    ensemble.bring(2)
    assert ensemble.fleet.roster.members[0].out is None


def test_a_server_with_less_room_may_not_join_later(loop):
    made = Ensemble(loop)
    loop.run(made.fakes[0].kill())
    loop.run(until(lambda: made.fleet.roster.members[0].out is not None))
    made.fakes[0].max_context = 32
    loop.run(made.fakes[0].start())
    assert [server.name for server in made.updates.reachable()] == [made.fakes[1].url]
    assert "32 tokens is below the 64" in made.fleet.roster.members[0].out
    made.close()
