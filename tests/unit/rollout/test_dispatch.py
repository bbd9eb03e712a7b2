"""Who gets which server, in which order."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_spear.rollout.engines.dispatch import Dispatcher, Flight, Member
from megatron_spear.rollout.engines.http import ServerLost


def members(number):
    made = [Member(SimpleNamespace(name=f"server {i}")) for i in range(number)]
    for member in made:
        member.out = None
    return made


async def settled():
    for _ in range(3):
        await asyncio.sleep(0)


class Queue:
    """Requests that take a place and keep it until told; ``order`` says who got one, and where."""

    def __init__(self, dispatch):
        self.dispatch, self.order, self.tasks = dispatch, [], {}

    async def ask(self, session, arrival=None):
        arrival = self.dispatch.arrive() if arrival is None else arrival
        self.tasks[session] = asyncio.create_task(self._take(arrival, session))
        await settled()

    async def _take(self, arrival, session):
        member = await self.dispatch.take(arrival, session)
        self.order.append((session, member.name))

    async def back(self, member):
        self.dispatch.give_back(member)
        await settled()


def test_those_that_wait_are_served_in_the_order_they_came():
    async def run():
        (one,) = members(1)
        queue = Queue(Dispatcher([one], 1))
        for session in "abcd":
            await queue.ask(session)
        for _ in range(3):
            await queue.back(one)
        return [session for session, _ in queue.order]

    assert asyncio.run(run()) == ["a", "b", "c", "d"]


def test_requests_of_an_earlier_step_are_served_first():
    """Also where a later step's session has its own server's queue."""

    async def run():
        (one,) = members(1)
        dispatch = Dispatcher([one], 1)
        queue = Queue(dispatch)
        await queue.ask("later", dispatch.arrive(3))
        for session, step in (("later", 3), ("b", 3), ("c", 2), ("d", 0), ("e", 2)):
            await queue.ask(session, dispatch.arrive(step))
        for _ in range(5):
            await queue.back(one)
        return [session for session, _ in queue.order[1:]]

    assert asyncio.run(run()) == ["d", "c", "e", "later", "b"]


def test_nobody_starves_behind_sessions_that_return():
    """Session a returns again and again to its own server; b, which is new, came before."""

    async def run():
        (one,) = members(1)
        queue = Queue(Dispatcher([one], 1))
        for session in ("a", "b"):
            await queue.ask(session)
        for _ in range(5):
            await queue.ask("a")
        await queue.back(one)
        return queue.order

    assert asyncio.run(run()) == [("a", "server 0"), ("b", "server 0")]


def test_a_returning_session_waits_for_its_server_while_others_use_the_free_one():
    async def run():
        one, two = members(2)
        queue = Queue(Dispatcher([one, two], 1))
        await queue.ask("a")
        await queue.ask("b")
        await queue.back(one)
        await queue.ask("c")  # server 0 again, for a new session
        await queue.ask("a")  # at home on server 0, which is full
        await queue.back(two)
        await queue.ask("d")
        middle = list(queue.order)
        await queue.back(one)
        return middle[2:], queue.order[4:]

    middle, end = asyncio.run(run())
    assert middle == [("c", "server 0"), ("d", "server 1")]
    assert end == [("a", "server 0")]


def test_a_request_that_is_sent_again_keeps_its_place_in_the_order():
    async def run():
        (one,) = members(1)
        dispatch = Dispatcher([one], 1)
        queue = Queue(dispatch)
        early = dispatch.arrive()
        for session in "abc":
            await queue.ask(session)
        await queue.ask("again", early)
        await queue.back(one)
        return queue.order[1]

    assert asyncio.run(run())[0] == "again"


def test_sessions_of_a_server_that_is_out_go_elsewhere_in_their_order():
    async def run():
        one, two = members(2)
        dispatch = Dispatcher([one, two], 1)
        queue = Queue(dispatch)
        for session in ("a", "b", "a", "c"):
            await queue.ask(session)
        one.take_out("gone")
        dispatch.dismiss(one)
        await queue.back(two)
        await queue.back(two)
        return queue.order[2:]

    assert asyncio.run(run()) == [("a", "server 1"), ("c", "server 1")]


def test_held_requests_are_spread_when_they_may_go():
    async def run():
        one, two = members(2)
        dispatch = Dispatcher([one, two], 10)
        queue = Queue(dispatch)
        dispatch.hold()
        for session in "abcdef":
            await queue.ask(session)
        held = list(queue.order)
        dispatch.let_go()
        await settled()
        return held, one.in_flight, two.in_flight

    assert asyncio.run(run()) == ([], 3, 3)


def test_a_place_given_to_a_cancelled_request_is_not_lost():
    async def run():
        (one,) = members(1)
        dispatch = Dispatcher([one], 1)
        queue = Queue(dispatch)
        for session in "abc":
            await queue.ask(session)
        dispatch.give_back(one)  # b has the place, and is cancelled before it wakes
        queue.tasks["b"].cancel()
        await settled()
        after = list(queue.order)
        await queue.back(one)
        return after, one.in_flight

    order, in_flight = asyncio.run(run())
    assert [session for session, _ in order] == ["a", "c"] and in_flight == 0


def test_errors_reach_all_that_wait():
    async def run():
        one, two = members(2)
        dispatch = Dispatcher([one, two], 1)
        queue = Queue(dispatch)
        for session in ("a", "b", "a", "c"):
            await queue.ask(session)
        waiting = [queue.tasks["a"], queue.tasks["c"]]
        dispatch.fail_waiting(ServerLost("all gone"))
        return await asyncio.gather(*waiting, return_exceptions=True), dispatch.num_waiting

    errors, left = asyncio.run(run())
    assert [str(error) for error in errors] == ["all gone"] * 2 and left == 0


def test_an_interrupted_flight_is_a_lost_server():
    async def run():
        (one,) = members(1)

        async def fly():
            async with Flight(one):
                await asyncio.sleep(10.0)

        flying = asyncio.create_task(fly())
        await settled()
        one.take_out("it failed an update")
        with pytest.raises(ServerLost, match="server 0 was taken out: it failed an update"):
            await flying
        assert not one.flights and flying.cancelling() == 0

    asyncio.run(run())


def test_a_flight_that_is_cancelled_by_its_caller_stays_cancelled():
    async def run():
        (one,) = members(1)

        async def fly():
            async with Flight(one):
                await asyncio.sleep(10.0)

        flying = asyncio.create_task(fly())
        await settled()
        flying.cancel()
        one.take_out("gone")
        with pytest.raises(asyncio.CancelledError):
            await flying

    asyncio.run(run())
