"""The environment pool, over processes of its own and over a server by TCP: batching, faults,
deadlines, restarts, loops, light workers."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_spear.errors import EnvironmentFault, EnvironmentsLost
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.testing.environment_servers import environment_server

TOY = "megatron_spear.testing.toy_environment:FaultyCorridor"
LONG = {"length": 1000, "start": 500}


@pytest.fixture(scope="module")
def remote_workers(tmp_path_factory):
    with environment_server(tmp_path_factory.mktemp("server")) as remote:
        yield remote


@pytest.fixture(params=["own", "remote"])
def make_pool(request):
    pools = []
    remote = request.getfixturevalue("remote_workers") if request.param == "remote" else None

    def make(workers=1, deadline_s=10.0, factory=TOY, **settings):
        pool = EnvironmentPool(
            factory, workers=workers, deadline_s=deadline_s, remote=remote, **settings
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


async def _opened(pool, count):
    slots = [await pool.open() for _ in range(count)]
    await asyncio.gather(*(pool.reset(slot, seed=0, options=LONG) for slot in slots))
    return slots


async def _worker_pid(pool, slot):
    return (await pool.step(slot, "modules")).info["pid"]


def _ended(pid):
    """True once the process is gone or waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return text.rsplit(")", 1)[1].split()[0] == "Z"


def test_slots_are_independent_environments(make_pool):
    async def run():
        pool = make_pool(workers=2)
        first, second = await _opened(pool, 2)
        assert first.worker != second.worker
        third = await pool.open()
        await pool.reset(third, seed=0, options=LONG)
        await pool.step(first, "right")
        results = await asyncio.gather(*(pool.step(s, "right") for s in (first, second, third)))
        assert [r.observation.split()[-1] for r in results] == ["502", "501", "501"]
        assert results[0].info["valid"] and results[0].reward == 0.0

    asyncio.run(run())


def test_a_freed_slot_serves_the_next_trajectory(make_pool):
    async def run():
        pool = make_pool()
        async with pool.slot() as slot:
            await pool.reset(slot, seed=0, options=LONG)
        async with pool.slot() as again:
            assert again is slot
            observation, _ = await pool.reset(again, seed=0, options={"length": 3, "start": 1})
            assert observation == "walk to place 2 you are at place 1"

    asyncio.run(run())


def test_workers_stay_light(make_pool):
    async def run():
        pool = make_pool()
        (slot,) = await _opened(pool, 1)
        modules = (await pool.step(slot, "modules")).info["modules"]
        heavy = {"torch", "transformers", "megatron", "pydantic", "numpy"}
        assert "megatron_spear.rollout.env_worker" in modules
        assert not heavy & {name.partition(".")[0] for name in modules}

    asyncio.run(run())


@pytest.mark.parametrize("action", ["crash", "lambda"])
def test_an_exception_costs_one_call(make_pool, action):
    async def run():
        pool = make_pool()
        bad, good = await _opened(pool, 2)
        pid = await _worker_pid(pool, good)
        outcomes = await asyncio.gather(
            pool.step(bad, action), pool.step(good, "right"), return_exceptions=True
        )
        assert isinstance(outcomes[0], EnvironmentFault)
        assert ("the floor gave way" if action == "crash" else "lambda") in str(outcomes[0])
        assert outcomes[1].observation.endswith("501")
        await pool.reset(bad, seed=0, options=LONG)
        assert (await pool.step(bad, "right")).observation.endswith("501")
        assert await _worker_pid(pool, good) == pid

    asyncio.run(run())


def _places(outcomes):
    return [int(outcome.observation.split()[-1]) for outcome in outcomes]


@pytest.mark.parametrize("last", ["exit", "hang"])
def test_what_ends_a_worker_costs_the_call_that_did_it(make_pool, last):
    """The other slots of the worker go on from where they were, calls in flight included."""

    async def run():
        pool = make_pool(deadline_s=0.5)
        slots = await _opened(pool, 4)
        for count in range(1, 4):
            await asyncio.gather(*(pool.step(slot, "right") for slot in slots[:count]))
        actions = ("right", "left", last, "right")
        calls = [pool.step(slot, action) for slot, action in zip(slots, actions, strict=True)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        fault = outcomes.pop(2)
        assert isinstance(fault, EnvironmentFault)
        assert ("exit status 3" if last == "exit" else "within 0.5 s") in str(fault)
        assert _places(outcomes) == [504, 501, 501]
        with pytest.raises(EnvironmentFault, match="reset the slot first"):
            await pool.step(slots[2], "left")
        await pool.reset(slots[2], seed=0, options=LONG)
        again = await asyncio.gather(*(pool.step(slot, "right") for slot in slots))
        assert _places(again) == [505, 502, 501, 502]

    asyncio.run(run())


def test_the_slots_of_other_workers_do_not_notice(make_pool):
    async def run():
        pool = make_pool(workers=2)
        lost, kept = await _opened(pool, 2)
        pid = await _worker_pid(pool, kept)
        with pytest.raises(EnvironmentFault, match="exit status 3"):
            await pool.step(lost, "exit")
        assert await _worker_pid(pool, kept) == pid

    asyncio.run(run())


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_killed_or_stopped_while_idle_costs_nothing(make_pool, stop):
    async def run():
        pool = make_pool(deadline_s=0.5)
        slots = await _opened(pool, 2)
        await pool.step(slots[0], "right")
        pid = await _worker_pid(pool, slots[0])
        os.kill(pid, stop)
        results = await asyncio.gather(*(pool.step(slot, "right") for slot in slots))
        assert _places(results) == [502, 501]
        assert await _worker_pid(pool, slots[0]) != pid

    asyncio.run(run())


def test_an_environment_that_answers_otherwise_the_second_time_is_not_continued(make_pool):
    async def run():
        pool = make_pool()
        chancy, other = await _opened(pool, 2)
        await pool.step(chancy, "pid")
        os.kill(await _worker_pid(pool, other), signal.SIGKILL)
        with pytest.raises(EnvironmentFault, match=r"cannot be continued .* call 1 \(step\)"):
            await pool.step(chancy, "right")
        assert _places([await pool.step(other, "right")]) == [501]

    asyncio.run(run())


def test_a_cancelled_hung_call_does_not_block_the_next(make_pool):
    async def run():
        pool = make_pool(deadline_s=0.4)
        (slot,) = await _opened(pool, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.step(slot, "hang"), timeout=0.1)
        with pytest.raises(EnvironmentFault, match="reset the slot first"):
            await pool.step(slot, "right")
        await pool.reset(slot, seed=0, options=LONG)
        assert _places([await pool.step(slot, "right")]) == [501]

    asyncio.run(run())


def test_restarts_in_a_row_are_budgeted(make_pool):
    async def run():
        pool = make_pool(max_restarts=2)
        slot = await pool.open()
        deadly = {**LONG, "first": "exit"}
        for _ in range(3):
            with pytest.raises(EnvironmentFault, match="exit status 3"):
                await pool.reset(slot, seed=0, options=deadly)
        for _ in range(2):
            with pytest.raises(EnvironmentsLost, match=r"times in a row .*exit status 3.* memory"):
                await pool.reset(slot, seed=0, options=LONG)

    asyncio.run(run())


def test_an_answer_restores_the_budget(make_pool):
    async def run():
        pool = make_pool(max_restarts=1)
        slot = await pool.open()
        for _ in range(4):
            await pool.reset(slot, seed=0, options=LONG)
            with pytest.raises(EnvironmentFault, match="exit status 3"):
                await pool.step(slot, "exit")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_module:Game", "no module 'no_such_module' on Python's path"),
        ("megatron_spear.errors:NoGame", "NoGame"),
        ("megatron_spear", "package.module:callable"),
    ],
)
def test_a_factory_that_cannot_be_loaded_is_named(make_pool, factory, message):
    async def run():
        pool = make_pool(factory=factory)
        slot = await pool.open()
        with pytest.raises(EnvironmentsLost, match=message):
            await pool.reset(slot, seed=0, options={})

    asyncio.run(run())


def test_options_that_cannot_be_pickled_cost_their_own_call(make_pool):
    async def run():
        pool = make_pool()
        (slot,) = await _opened(pool, 1)
        with pytest.raises(EnvironmentFault, match="cannot be sent"):
            await pool.reset(slot, seed=0, options={"length": lambda: 3})
        await pool.reset(slot, seed=0, options=LONG)

    asyncio.run(run())


def test_messages_larger_than_the_socket_buffer(make_pool):
    async def run():
        pool = make_pool()
        slots = [await pool.open() for _ in range(8)]
        options = {**LONG, "padding": "x" * 1_000_000}
        calls = (pool.reset(slot, seed=0, options=options) for slot in slots)
        assert len(await asyncio.gather(*calls)) == 8

    asyncio.run(run())


def test_one_event_loop_after_the_other_in_threads(make_pool):
    pool, seen, pids = make_pool(), [], set()

    async def run():
        (slot,) = await _opened(pool, 1)
        seen.append((await pool.step(slot, "right")).observation)
        pids.add(await _worker_pid(pool, slot))
        # Left pending when the loop closes: the next loop must not mind.
        task = asyncio.create_task(pool.step(slot, "right"))
        await asyncio.sleep(0)
        assert not task.done()

    for _ in range(3):
        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        thread.join(timeout=20)
    assert seen == ["you are at place 501"] * 3
    assert len(pids) == 1


def test_close_fails_pending_calls_and_later_ones(make_pool):
    async def run():
        pool = make_pool()
        (slot,) = await _opened(pool, 1)
        pending = asyncio.create_task(pool.step(slot, "hang"))
        await asyncio.sleep(0.05)
        pool.close()
        with pytest.raises(EnvironmentFault, match="closed"):
            await pending
        with pytest.raises(EnvironmentFault, match="closed"):
            await pool.reset(slot, seed=0, options=LONG)

    asyncio.run(run())


_PARENT = """
import asyncio, os, signal
from megatron_spear.rollout.env_pool import EnvironmentPool
async def main():
    pool = EnvironmentPool("%s", workers=1, deadline_s=60)
    slot = await pool.open()
    await pool.reset(slot, seed=0, options={"length": 9})
    pid = (await pool.step(slot, "modules")).info["pid"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    await pool.step(slot, "left")
    print(pid, flush=True)
    asyncio.create_task(pool.step(slot, "%s"))
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@pytest.mark.parametrize("action", ["left", "hang"])
def test_workers_ignore_signals_and_end_with_their_parent(action):
    parent = subprocess.run(
        [sys.executable, "-c", _PARENT % (TOY, action)], capture_output=True, text=True, timeout=60
    )
    pid = int(parent.stdout)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not _ended(pid):
        time.sleep(0.05)
    assert _ended(pid), "the worker outlived its parent"
