"""Environment workers behind a server: strangers, servers that die, stop or move, what is left."""

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_spear.errors import ConfigError, EnvironmentFault, EnvironmentsLost
from megatron_spear.rollout import env_link
from megatron_spear.rollout.env_handshake import prove_to_server, read_secret
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.env_remote import RemoteWorkers
from megatron_spear.testing.environment_servers import LocalServer, make_secret

TOY = "megatron_spear.testing.toy_environment:FaultyCorridor"
LONG = {"length": 1000, "start": 500}


@pytest.fixture
def secret_file(tmp_path):
    return make_secret(tmp_path)


@pytest.fixture
def server(tmp_path, secret_file):
    server = LocalServer(tmp_path, secret_file)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def make_pool(server, secret_file):
    pools = []

    def make(deadline_s=10.0, max_restarts=20, **remote):
        everything = {
            "address": lambda index: server.address(),
            "secret": read_secret(secret_file),
            **remote,
        }
        pool = EnvironmentPool(
            TOY,
            workers=1,
            deadline_s=deadline_s,
            max_restarts=max_restarts,
            remote=RemoteWorkers(**everything),
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


async def _opened(pool, count=1):
    slots = [await pool.open() for _ in range(count)]
    await asyncio.gather(*(pool.reset(slot, seed=0, options=LONG) for slot in slots))
    return slots


async def _worker_pid(pool, slot):
    return (await pool.step(slot, "modules")).info["pid"]


def _place(result):
    return int(result.observation.split()[-1])


def _wait_for_end(pid, limit_s=5.0):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            return
        if stat.rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} was left behind")


def _connect(server):
    host, _, port = server.address().rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5.0)


class _Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, file):
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


def test_nothing_of_a_stranger_is_unpickled(server, make_pool, tmp_path):
    mark = tmp_path / "unpickled"
    body = pickle.dumps(_Bomb(mark))
    frame = len(body).to_bytes(4, "little") + (0).to_bytes(8, "little") + body
    for garbage in (frame * 20, b"GET / HTTP/1.1\r\n\r\n" * 20, b"\x00" * 64):
        with _connect(server) as stranger, contextlib.suppress(ConnectionResetError):
            stranger.sendall(garbage)
            while stranger.recv(4096):  # until it is sent away
                pass
    assert not mark.exists()

    async def run():
        pool = make_pool()
        (slot,) = await _opened(pool)
        assert _place(await pool.step(slot, "right")) == 501

    asyncio.run(run())


def test_a_silent_stranger_holds_nobody_up(server, make_pool):
    async def run():
        pool = make_pool()
        (slot,) = await _opened(pool)
        assert _place(await pool.step(slot, "right")) == 501

    with _connect(server), _connect(server):
        asyncio.run(run())


def test_a_wrong_secret_is_refused(server, make_pool):
    with _connect(server) as stranger, pytest.raises(ConnectionError, match="closed the"):
        prove_to_server(stranger, b"another secret of 32 bytes......", 5.0)

    async def run():
        pool = make_pool(max_restarts=1, secret=b"wrong" * 8, connect_s=0.5)
        slot = await pool.open()
        with pytest.raises(EnvironmentsLost, match=r"not reached in 0.5 s \(127.0.0.1:\d+: closed"):
            await pool.reset(slot, seed=0, options=LONG)

    asyncio.run(run())


def test_a_server_that_does_not_know_the_secret_gets_no_frame(secret_file):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"megatron-spear environment server 1\n" + bytes(32) + bytes(32))
        with pytest.raises(ConnectionError, match="does not know the secret"):
            prove_to_server(ours, read_secret(secret_file), 1.0)
        assert len(theirs.recv(4096)) == 64
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError, match="0 of 68 bytes"):
        prove_to_server(ours, read_secret(secret_file), 0.1)


def test_secrets_are_looked_at(tmp_path, secret_file):
    assert len(read_secret(secret_file)) == 64
    secret_file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 640\); expected 600"):
        read_secret(secret_file)
    secret_file.chmod(0o600)
    secret_file.write_text("short\n")
    with pytest.raises(ConfigError, match="holds 5 bytes"):
        read_secret(secret_file)
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(tmp_path / "none")


def test_a_server_that_dies_in_a_call_costs_that_call_and_may_move(server, make_pool):
    """Another one is started, at another port; other slots go on from where they were."""

    async def run():
        pool = make_pool(deadline_s=20.0)
        hung, other = await _opened(pool, 2)
        await pool.step(other, "right")
        pid, before = await _worker_pid(pool, other), server.address()
        calls = [asyncio.create_task(pool.step(hung, "hang"))]
        await asyncio.sleep(0.1)
        calls.append(asyncio.create_task(pool.step(other, "right")))
        await asyncio.sleep(0.1)
        server.kill()
        server.start()
        assert server.address() != before
        fault, answer = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(fault, EnvironmentFault)
        assert "died (nothing more is known)" in str(fault)
        assert _place(answer) == 502
        _wait_for_end(pid)
        await pool.reset(hung, seed=0, options=LONG)
        assert _place(await pool.step(hung, "right")) == 501

    asyncio.run(run())


def test_a_server_that_dies_while_idle_costs_nothing(server, make_pool):
    async def run():
        pool = make_pool()
        (slot,) = await _opened(pool)
        pid = await _worker_pid(pool, slot)
        server.kill()
        _wait_for_end(pid)
        server.start()
        assert _place(await pool.step(slot, "right")) == 501

    asyncio.run(run())


@pytest.fixture
def short_last_word(monkeypatch):
    monkeypatch.setattr(env_link, "_LAST_WORD_S", 0.3)


@pytest.mark.usefixtures("short_last_word")
def test_a_machine_that_stops_answering_costs_the_oldest_call(server, make_pool):
    """Server and worker stopped, as their machine would be; the pool goes on with another."""

    async def run():
        pool = make_pool(deadline_s=0.5, handshake_s=0.5)
        slots = await _opened(pool, 2)
        pid = await _worker_pid(pool, slots[0])
        os.kill(server.pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGSTOP)
        calls = [asyncio.create_task(pool.step(slot, "right")) for slot in slots]
        await asyncio.sleep(1.0)
        try:
            server.kill()
            server.start()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert isinstance(outcomes[0], EnvironmentFault)
        assert "within 0.5 s" in str(outcomes[0]) and "nothing more is known" in str(outcomes[0])
        assert _place(outcomes[1]) == 501
        _wait_for_end(pid)

    asyncio.run(run())


@pytest.mark.usefixtures("short_last_word")
def test_a_hung_worker_that_reads_nothing_is_ended(make_pool):
    """What the pool still has to send does not keep its leaving from the server."""

    async def run():
        pool = make_pool(deadline_s=0.5)
        (slot,) = await _opened(pool)
        pid = await _worker_pid(pool, slot)
        others = [await pool.open() for _ in range(4)]
        big = {**LONG, "padding": "x" * 8_000_000}
        hung = asyncio.create_task(pool.step(slot, "hang"))
        await asyncio.sleep(0.05)
        calls = [asyncio.create_task(pool.reset(other, seed=0, options=big)) for other in others]
        with pytest.raises(EnvironmentFault, match=r"within 0\.5 s"):
            await hung
        _wait_for_end(pid)
        pool.close()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(run())


def test_a_worker_without_an_address_is_waited_for_and_not_for_ever(server, make_pool):
    async def run():
        address = [None]
        pool = make_pool(max_restarts=1, address=lambda index: address[index], connect_s=0.4)
        slot = await pool.open()
        with pytest.raises(EnvironmentsLost, match=r"not reached in 0.4 s \(it is not registered"):
            await pool.reset(slot, seed=0, options=LONG)
        patient = make_pool(address=lambda index: address[index])
        slot = await patient.open()
        call = asyncio.create_task(patient.reset(slot, seed=0, options=LONG))
        await asyncio.sleep(0.3)
        address[0] = server.address()
        assert (await call)[0].endswith("500")

    asyncio.run(run())


_POOL = """
import asyncio, os, signal, sys
from pathlib import Path
from megatron_spear.rollout.env_handshake import read_secret
from megatron_spear.rollout.env_pool import EnvironmentPool
from megatron_spear.rollout.env_remote import RemoteWorkers
async def main(address, secret, action):
    remote = RemoteWorkers(address=lambda index: address, secret=read_secret(Path(secret)))
    pool = EnvironmentPool("%s", workers=1, deadline_s=60, remote=remote)
    slot = await pool.open()
    await pool.reset(slot, seed=0, options={"length": 9})
    print((await pool.step(slot, "modules")).info["pid"], flush=True)
    asyncio.create_task(pool.step(slot, action))
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("action", ["left", "hang"])
def test_workers_end_when_their_pool_is_killed(server, secret_file, action):
    pool = subprocess.run(
        [sys.executable, "-c", _POOL % TOY, server.address(), str(secret_file), action],
        capture_output=True,
        text=True,
        timeout=60,
    )
    _wait_for_end(int(pool.stdout))


def test_workers_end_when_their_pool_closes(make_pool):
    async def run():
        pool = make_pool()
        (slot,) = await _opened(pool)
        pid = await _worker_pid(pool, slot)
        pool.close()
        _wait_for_end(pid)

    asyncio.run(run())


def test_settings_that_cannot_work_end_the_server(tmp_path, secret_file):
    def started(host, secret):
        line = [sys.executable, "-m", "megatron_spear.rollout.env_server", "--host", host]
        line += ["--address-file", str(tmp_path / "address"), "--secret-file", str(secret)]
        return subprocess.run(line, capture_output=True, text=True, timeout=60)

    done = started("127.0.0.1", tmp_path / "none")
    assert done.returncode == 2 and "the secret of environment workers" in done.stderr
    done = started("203.0.113.7", secret_file)
    assert done.returncode == 2 and "error:" in done.stderr
    assert not (tmp_path / "address").exists()
