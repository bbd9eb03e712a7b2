"""Attempts of an earlier step are played before those that run ahead."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from fleet_cases import fleet_over

from megatron_spear.rollout.engine import GenerationRequest, SamplingParams
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.rollout.slots import Slots
from megatron_spear.types import Prompt, Status, Trajectory


class Holders:
    """Those that come to ``slots``; ``order`` says who got a place, and each keeps it until it is
    ``done``."""

    def __init__(self, number):
        self.slots, self.order = Slots(number), []
        self.tasks, self.ends = {}, {}

    async def come(self, name, step):
        self.ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, step))
        await settled()

    async def _hold(self, name, step):
        async with self.slots.held(step):
            self.order.append(name)
            await self.ends[name].wait()

    async def done(self, name):
        self.ends[name].set()
        await settled()


async def settled():
    for _ in range(4):
        await asyncio.sleep(0)


def test_a_free_place_goes_to_the_lowest_step_and_there_to_the_first():
    async def run():
        holders = Holders(1)
        for name, step in [("a", 2), ("b", 2), ("c", 3), ("d", 1), ("e", 2), ("f", 1)]:
            await holders.come(name, step)
        for name in "adfbe":
            await holders.done(name)
        return holders.order

    assert asyncio.run(run()) == list("adfbec")


def test_a_waiter_that_is_cancelled_takes_no_place_with_it():
    async def run():
        holders = Holders(1)
        for name in "abc":
            await holders.come(name, 1)
        holders.tasks["b"].cancel()  # while it waits
        await settled()
        await holders.done("a")
        await holders.come("d", 1)
        await holders.come("e", 1)
        holders.ends["c"].set()  # d gets the place, and is cancelled before it wakes
        await asyncio.sleep(0)
        holders.tasks["d"].cancel()
        await settled()
        order = list(holders.order)
        await holders.done("e")
        await holders.come("f", 1)
        return order, holders.order, holders.tasks["d"].cancelled()

    order, after, cancelled = asyncio.run(run())
    assert order == ["a", "c", "e"] and after == ["a", "c", "e", "f"] and cancelled


def test_a_holder_that_fails_gives_its_place_back():
    async def run():
        slots = Slots(1)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                async with slots.held(1):
                    raise ZeroDivisionError
        async with asyncio.timeout(1.0), slots.held(1):
            pass

    asyncio.run(run())


class Plays(Rollouter):
    """Each attempt takes 20 ms."""

    async def _guarded(self, attempt):
        await asyncio.sleep(0.02)
        return Trajectory(
            id=attempt.id, prompt=attempt.prompt, segments=(), status=Status.COMPLETED
        ), None


def prompts(number):
    return [
        Prompt(prompt_id=f"p{i}", env="x", kind="", messages=(), metadata={}) for i in range(number)
    ]


@pytest.mark.parametrize("seed", [(0, 1, 1), (0, 0)], ids=["further round", "evaluation"])
def test_a_small_round_ends_before_a_later_set(seed):
    with EventLoop("rollouts") as loop:
        stage = SimpleNamespace(max_slots=2)
        plays = Plays(None, None, None, None, stage, history="full", max_turns=1, loop=loop)
        ahead = {"group_size": 8, "temperature": 1.0}
        later = plays.start(prompts(4), seed=(0, 2), **ahead)
        (group,) = plays.collect_sync(prompts(1), group_size=2, seed=seed, temperature=1.0)
        assert len(group.members) == 2 and not later.done()
        assert [len(group.members) for group in later.result(5.0)] == [8] * 4


def test_a_servers_queue_keeps_to_the_steps_too():
    finished = []

    async def run():
        async with fleet_over(1, step_s=0.005, max_requests=1) as (fleet, _):

            async def draw(step, session):
                request = GenerationRequest(
                    session=session,
                    token_ids=np.array([1, 2], np.int32),
                    sampling=SamplingParams(max_new_tokens=2),
                    seed=(0, step),
                    step=step,
                )
                await fleet.generate(request)
                finished.append(step)

            going = [asyncio.create_task(draw(2, f"later {i}")) for i in range(4)]
            await asyncio.sleep(0)
            await asyncio.gather(*going, draw(1, "now"))

    asyncio.run(run())
    assert finished == [2, 1, 2, 2, 2]
