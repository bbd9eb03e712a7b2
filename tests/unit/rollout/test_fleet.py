"""A fleet serves through what happens to its servers, and gives up in bounded time."""

import asyncio
import time

import numpy as np
import pytest
from fleet_cases import PROMPT, VOCAB, ask, fleet_over, greedy, greedy_tokens, limits, until

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.fleet import Fleet
from megatron_spear.types import VersionSpan


def ports_of(fakes):
    return [fake.url.rsplit(":", 1)[1] for fake in fakes]


def served_by(fakes):
    return [len(fake.bodies("/generate")) for fake in fakes]


def test_what_a_server_draws_comes_back():
    async def run():
        async with fleet_over(1) as (fleet, fakes):
            answer = await fleet.generate(greedy(new=5))
            assert fleet.policy_version == 1 and fleet.max_context == fakes[0].max_context
            return answer

    answer = asyncio.run(run())
    assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 5)
    assert answer.token_ids.dtype == np.int32 and answer.logprobs.dtype == np.float32
    assert answer.finish_reason == "length" and answer.versions == (VersionSpan(1, 5),)


def test_a_session_stays_and_new_ones_go_where_the_fewest_are():
    async def run():
        async with fleet_over(2, step_s=0.01) as (fleet, fakes):
            await asyncio.gather(*(fleet.generate(greedy(i, new=2)) for i in range(6)))
            first = {b["session_id"]: i for i in (0, 1) for b in fakes[i].bodies("/generate")}
            spread = served_by(fakes)
            for fake in fakes:
                fake.calls.clear()
            await asyncio.gather(*(fleet.generate(greedy(i, new=2)) for i in (5, 3, 0, 2, 4, 1)))
            second = {b["session_id"]: i for i in (0, 1) for b in fakes[i].bodies("/generate")}
            fleet.release("session 0")
            return spread, first, second, "session 0" in fleet._dispatch._home

    spread, first, second, kept = asyncio.run(run())
    assert spread == [3, 3] and first == second and not kept


def test_no_more_than_max_requests_are_in_flight():
    most = [0]

    async def run():
        async with fleet_over(1, step_s=0.005, max_requests=3) as (fleet, (fake,)):

            async def watch():
                while True:
                    most.append(fake.num_running)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            answers = await asyncio.gather(*(fleet.generate(ask(i, new=3)) for i in range(20)))
            watching.cancel()
            return answers

    assert len(asyncio.run(run())) == 20
    assert max(most) == 3


@pytest.mark.parametrize("bad", [-1, 100, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_never_sent(bad):
    async def run():
        async with fleet_over(1) as (fleet, (fake,)):
            with pytest.raises(EngineError, match=r"'session 0'.*the vocabulary is 0\.\.99"):
                await fleet.generate(ask(prompt=(3, bad)))
            assert not fake.bodies("/generate")
            await fleet.generate(ask(prompt=(0, 99)))

    asyncio.run(run())


def test_a_prompt_that_fills_the_context_is_answered_here():
    async def run():
        async with fleet_over(1) as (fleet, (fake,)):
            full = await fleet.generate(ask(prompt=[1] * fake.max_context))
            last = await fleet.generate(ask(prompt=[1] * (fake.max_context - 1)))
            return full, last, served_by([fake])

    full, last, served = asyncio.run(run())
    assert (full.finish_reason, len(full.token_ids)) == ("context", 0)
    assert (last.finish_reason, len(last.token_ids)) == ("context", 1)
    assert full.versions == (VersionSpan(1, 0),) and served == [1]


def test_a_generation_goes_on_where_the_models_own_end_token_stopped_it():
    tokens = greedy_tokens(PROMPT, 8)

    async def run():
        async with fleet_over(1) as (fleet, (fake,)):
            fake.eos_token_ids = (tokens[2],)
            answer = await fleet.generate(greedy(new=8, stop=(tokens[6],)))
            return answer, fake.bodies("/generate")

    answer, (first, second) = asyncio.run(run())
    assert answer.token_ids.tolist() == tokens[:7] and answer.finish_reason == "stop"
    assert answer.versions == (VersionSpan(1, 7),)
    assert first["input_ids"] == list(PROMPT) and first["rid"] != second["rid"]
    assert second["input_ids"] == [*PROMPT, *tokens[:3]]
    assert second["sampling_params"]["max_new_tokens"] == 5


RECOVERED = ["drop", "garbage", "truncated", "busy", "error", "abort", "foreign"]
TAKEN_OUT = {
    "drop": "failed",
    "garbage": "expected JSON",
    "truncated": "hung up",
    "foreign": "dead",
}


@pytest.mark.parametrize("fault", RECOVERED)
def test_a_failed_request_is_sent_again(fault):
    async def run():
        async with fleet_over(2, probe_s=60.0) as (fleet, fakes):
            # A kept connection that ends is tried once more: it has to be dropped twice.
            fakes[0].faults += [fault] * (2 if fault == "drop" else 1)
            answers = await asyncio.gather(*(fleet.generate(greedy(i)) for i in range(4)))
            return answers, [member.out for member in fleet.roster.members]

    answers, out = asyncio.run(run())
    for answer in answers:
        assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 8)
    assert out[1] is None
    if fault in TAKEN_OUT:
        assert TAKEN_OUT[fault] in out[0]
    else:
        assert out[0] is None


def test_a_refused_request_is_not_sent_again():
    async def run():
        async with fleet_over(2) as (fleet, fakes):
            for fake in fakes:
                fake.faults.append("refuse")
            with pytest.raises(EngineError, match=r"'session 0'.*not for us"):
                await fleet.generate(ask())
            assert sum(served_by(fakes)) == 1
            assert all(member.out is None for member in fleet.roster.members)

    asyncio.run(run())


def test_tries_are_bounded():
    async def run():
        async with fleet_over(1, max_tries=3) as (fleet, (fake,)):
            fake.faults += ["busy"] * 9
            with pytest.raises(EngineError, match=r"'session 0' failed 3 times.*overloaded"):
                await fleet.generate(ask())
            return served_by([fake])

    assert asyncio.run(run()) == [3]


def test_a_server_killed_in_its_requests_is_replaced():
    async def run():
        async with fleet_over(2, step_s=0.01) as (fleet, fakes):
            going = [asyncio.create_task(fleet.generate(greedy(i, new=20))) for i in range(8)]
            await until(lambda: all(fake.num_running == 4 for fake in fakes))
            await fakes[0].kill()
            answers = await asyncio.gather(*going)
            late = await fleet.generate(greedy(new=3))
            again = served_by(fakes)
            await fakes[0].start()
            return [*answers, late], again

    answers, served = asyncio.run(run())
    for answer in answers:
        size = len(answer.token_ids)
        assert size in (3, 20) and answer.token_ids.tolist() == greedy_tokens(PROMPT, size)
    assert served == [4, 9]


def test_without_any_server_the_wait_is_bounded_and_names_each():
    async def run():
        async with fleet_over(2, step_s=0.01, all_out_s=0.3) as (fleet, fakes):
            going = [asyncio.create_task(fleet.generate(ask(i, new=50))) for i in range(4)]
            await until(lambda: all(fake.num_running == 2 for fake in fakes))
            started = time.monotonic()
            for fake in fakes:
                await fake.kill()
            errors = await asyncio.gather(*going, return_exceptions=True)
            waited_s = time.monotonic() - started
            with pytest.raises(EngineError, match="no engine server has served"):
                await fleet.generate(ask())
            at_once_s = time.monotonic() - started - waited_s
            for fake in fakes:
                await fake.start()
            return errors, ports_of(fakes), waited_s, at_once_s

    errors, ports, waited_s, at_once_s = asyncio.run(run())
    for error in errors:
        assert isinstance(error, EngineError)
        assert "no engine server has served for 0.3 s" in str(error)
        assert all(port in str(error) for port in ports)
    assert 0.3 <= waited_s < 1.5 and at_once_s < 0.2


def test_before_the_first_weights_nothing_is_served():
    async def run():
        async with fleet_over(1, version=None, all_out_s=0.1) as (fleet, (fake,)):
            with pytest.raises(EngineError, match="has not been given this run's weights"):
                await fleet.generate(ask())
            assert not fake.bodies("/generate")

    asyncio.run(run())


def test_a_slow_server_costs_the_request_its_deadline_and_is_told():
    async def run():
        async with fleet_over(1, deadline_s=0.2) as (fleet, (fake,)):
            fake.step_s = 0.02
            started = time.monotonic()
            with pytest.raises(EngineError, match=r"'session 0' took more than 0\.2 s"):
                await fleet.generate(ask(new=60))
            took_s = time.monotonic() - started
            await until(lambda: fake.bodies("/abort_request"))
            await until(lambda: fake.num_running == 0)
            rid = fake.bodies("/generate")[0]["rid"]
            fake.step_s = 0.0
            await fleet.generate(ask(new=3))
            return took_s, rid, fake.bodies("/abort_request")

    took_s, rid, aborted = asyncio.run(run())
    assert took_s < 1.0 and aborted == [{"rid": rid}]


def test_waiting_for_a_server_costs_nothing_of_the_deadline():
    async def run():
        async with fleet_over(1, deadline_s=0.9, max_requests=1) as (fleet, (fake,)):
            fake.step_s = 0.02
            calls = [fleet.generate(ask(i, new=20)) for i in range(3)]
            return [len(answer.token_ids) for answer in await asyncio.gather(*calls)]

    started = time.monotonic()
    assert asyncio.run(run()) == [20, 20, 20]
    assert time.monotonic() - started > 1.0, "the last one waited for longer than its deadline"


def test_a_cancelled_call_ends_on_the_server():
    async def run():
        async with fleet_over(1, step_s=0.02) as (fleet, (fake,)):
            going = asyncio.create_task(fleet.generate(ask(new=60)))
            await until(lambda: fake.num_running == 1)
            going.cancel()
            with pytest.raises(asyncio.CancelledError):
                await going
            await until(lambda: fake.num_running == 0)
            member = fleet.roster.members[0]
            assert (member.out, member.in_flight, member.flights) == (None, 0, set())
            return fake.bodies("/generate")[0]["rid"], fake.bodies("/abort_request")

    rid, aborted = asyncio.run(run())
    assert aborted == [{"rid": rid}]


def test_a_server_that_hangs_is_found_and_its_requests_go_elsewhere():
    async def run():
        async with fleet_over(2, deadline_s=20.0) as (fleet, fakes):
            fakes[0].faults.append("hang")
            going = asyncio.create_task(fleet.generate(greedy()))
            await until(lambda: served_by(fakes) == [1, 0])
            member = fleet.roster.members[0]
            member.server.label = lambda: _hangs(member.name)
            return await asyncio.wait_for(going, 5.0), member.out

    async def _hangs(name):
        from megatron_spear.rollout.engines.http import ServerLate

        raise ServerLate(f"GET {name}/model_info had no answer")

    answer, out = asyncio.run(run())
    assert answer.token_ids.tolist() == greedy_tokens(PROMPT, 8)
    assert "had no answer" in out


def test_log_probs_that_are_not_finite_fail_the_request_alone():
    async def run():
        async with fleet_over(1) as (fleet, (fake,)):
            fake._answer = lambda drawing, reason: {
                "output_ids": [1],
                "meta_info": {
                    "finish_reason": {"type": "length", "length": 1},
                    "weight_version": fake.label,
                    "output_token_logprobs": [[None, 1, None]],
                },
            }
            with pytest.raises(EngineError, match="not finite; check the weights"):
                await fleet.generate(ask(new=1))
            return fleet.roster.members[0].out

    assert asyncio.run(run()) is None


def test_more_tokens_than_asked_for_are_an_error():
    async def run():
        async with fleet_over(1) as (fleet, (fake,)):
            fake.token = lambda context, params: 7
            answer = fake._answer

            def longer(drawing, reason):
                drawing.draw(7, fake.label)
                return answer(drawing, reason)

            fake._answer = longer
            with pytest.raises(EngineError, match="wrong length: '3 tokens for 2'"):
                await fleet.generate(ask(new=2))

    asyncio.run(run())


def test_a_closed_fleet_fails_what_waits_and_what_is_under_way():
    async def run():
        async with fleet_over(1, step_s=0.02, max_requests=1) as (fleet, (fake,)):
            going = [asyncio.create_task(fleet.generate(ask(i, new=60))) for i in range(3)]
            await until(lambda: fake.num_running == 1)
            started = time.monotonic()
            await fleet.close()
            errors = await asyncio.gather(*going, return_exceptions=True)
            with pytest.raises(EngineError, match="closed"):
                await fleet.generate(ask())
            return errors, time.monotonic() - started

    errors, took_s = asyncio.run(run())
    assert all(isinstance(e, EngineError) and "closed" in str(e) for e in errors)
    assert took_s < 1.0


def test_a_fleet_that_was_not_started_says_so():
    fleet = Fleet([], vocab_size=VOCAB, limits=limits())
    with pytest.raises(EngineError, match="not started"):
        asyncio.run(fleet.generate(ask()))


def test_a_fleet_without_a_server_does_not_start():
    async def run():
        async with fleet_over(2) as (_, fakes):
            for fake in fakes:
                await fake.kill()
            try:
                async with fleet_over(fakes=fakes):
                    pass
            finally:
                for fake in fakes:
                    await fake.start()

    with pytest.raises(EngineError, match=r"no engine server answered within 2 s.*:.*:"):
        asyncio.run(run())
