"""The event loop in a thread: results, errors, cancellation, and its end."""

import asyncio
import threading

import pytest

from megatron_spear.errors import EngineError
from megatron_spear.rollout.event_loop import EventLoop


async def _double(x):
    await asyncio.sleep(0)
    return 2 * x


def test_results_and_errors_come_back_and_the_set_up_ran_in_its_thread():
    names = []
    with EventLoop("mine", lambda: names.append(threading.current_thread().name)) as loop:
        assert loop.run(_double(4)) == 8
        future = loop.start(_double(5))
        assert future.result(5) == 10

        async def fail():
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            loop.run(fail())
    assert names == ["mine"]


def test_what_interrupts_the_wait_cancels_the_work():
    ended = threading.Event()

    async def endless():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with EventLoop("mine") as loop:
        future = loop.start(endless())
        future.cancel()
        assert ended.wait(5)


def test_closing_cancels_what_is_under_way_and_more_is_refused():
    ended = threading.Event()

    async def endless():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    loop = EventLoop("mine")
    loop.start(endless())
    loop.run(_double(1))
    loop.close()
    assert ended.is_set()
    loop.close()
    with pytest.raises(EngineError, match="closed"):
        loop.run(_double(1))
