"""Environment workers of an attempt are found by its registry, also after they have moved."""

import asyncio

import pytest

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.registry import Registration, register, unregister
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.testing.environment_servers import LocalServer
from megatron_spear.trainer.registered import environment_workers

TOY = "megatron_spear.testing.toy_environment:CorridorEnvironment"


@pytest.fixture
def attempt(tmp_path):
    return Attempt.begin(tmp_path)


def _register(attempt, server, index=0):
    registration = Registration(
        role="environment", index=index, address=server.address(), node="n0", pid=server.pid
    )
    register(attempt.registry, registration)


def test_an_address_comes_and_goes_with_the_registration(attempt):
    remote = environment_workers(attempt)
    assert remote.address(1) is None
    for index in (1, 11):
        register(
            attempt.registry,
            Registration(role="environment", index=index, address=f"n{index}:5", node="n", pid=1),
        )
    assert remote.address(1) == "n1:5"
    unregister(attempt.registry, "environment", 1)
    assert remote.address(1) is None
    (attempt.registry / "environment_1.json").write_text('{"role": "envi')
    assert remote.address(1) is None


def test_a_worker_that_was_started_again_elsewhere_is_found(attempt, tmp_path):
    server = LocalServer(tmp_path, attempt.secret_file)
    remote = environment_workers(attempt)

    async def run(pool):
        async with pool.slot() as slot:
            await pool.reset(slot, seed=0, options={"length": 9, "start": 3})
            server.kill()
            unregister(attempt.registry, "environment", 0)
            step = asyncio.create_task(pool.step(slot, "right"))
            await asyncio.sleep(0.3)
            server.start()
            _register(attempt, server)
            assert (await step).observation.endswith("4")

    with EnvironmentPool(TOY, workers=1, deadline_s=20.0, remote=remote) as pool:
        try:
            server.start()
            _register(attempt, server)
            asyncio.run(run(pool))
        finally:
            server.kill()
