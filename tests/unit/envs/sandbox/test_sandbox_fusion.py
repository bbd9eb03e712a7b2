"""The client of SandboxFusion, against a server of its API that runs code for real."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from megatron_spear.envs.sandbox import fusion
from megatron_spear.envs.sandbox.execution import Execution
from megatron_spear.envs.sandbox.fusion import FusionSandbox
from megatron_spear.envs.sandbox.local import LocalSandbox
from megatron_spear.errors import ConfigError, EnvironmentFault
from megatron_spear.testing.sandbox_server import SandboxServer, answer_of


@pytest.fixture
def server(small: LocalSandbox) -> Iterator[SandboxServer]:
    with SandboxServer(small) as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts."""
    monkeypatch.setattr(fusion, "_PAUSE_S", 0.01)


def client(url: str, **changes: int) -> FusionSandbox:
    settings = {"memory_mb": 256, "max_output_chars": 1000, "attempts": 3, **changes}
    return FusionSandbox(url=url, timeout_s=1.0, **settings)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('é', 6 * 7)", "ok"),
        ("1/0", "error"),
        ("while True: pass", "timeout"),
        ("x = bytearray(1 << 30)", "memory"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
        ("print('x' * 3000)", "ok"),
        ("\ud800", "unavailable"),
        ("a\x00b", "error"),
    ],
)
def test_it_says_what_the_local_sandbox_says(
    server: SandboxServer, short: LocalSandbox, code: str, status: str
) -> None:
    if status == "timeout":
        server.sandbox = short
    here, there = server.sandbox.run(code), client(server.url).run(code)
    assert there.status == here.status == status
    assert there.stdout[:1000] == here.stdout[:1000]
    assert there.stderr == here.stderr
    assert there.time_s < 20.0


def test_what_is_asked(server: SandboxServer) -> None:
    client(server.url).run("print(1)")
    assert server.requests == [
        {
            "code": "print(1)",
            "language": "python",
            "compile_timeout": 1.0,
            "run_timeout": 1.0,
            "memory_limit_MB": 256,
            "files": {},
            "fetch_files": [],
        }
    ]


def test_outputs_are_cut_here_too(server: SandboxServer) -> None:
    execution = client(server.url, max_output_chars=10).run("print('x' * 300)")
    assert execution.stdout == "x" * 10 + "\n[cut here: 301 bytes in all]"


def whole(body: bytes) -> bytes:
    """An answer of status 200."""
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ([500, 503], "status 503"),
        ([429, 504], "status 504"),
        ([b"", b"garbage\r\n"], "BadStatusLine"),
        ([whole(b"{")[:-1], whole(b"not JSON")], "not JSON"),
        ([whole(b"[]"), whole(b"{}")], "no answer of /run_code"),
        ([whole(json.dumps({"status": "SandboxError", "message": "no space", "run_result": None})
                .encode())] * 2, "no space"),
    ],
)  # fmt: skip
def test_a_server_that_fails_is_asked_again(
    server: SandboxServer, failures: list[int | bytes], words: str
) -> None:
    server.fail(*failures)
    assert client(server.url).run("print(1)").stdout == "1\n"
    server.fail(*failures[:1], *failures[1:] * 2)
    with pytest.raises(EnvironmentFault, match="failed 3 times") as fault:
        client(server.url).run("print(1)")
    assert words in str(fault.value) and server.url in str(fault.value)
    assert client(server.url).run("print(2)").stdout == "2\n"


def test_a_request_that_is_refused_is_not_repeated(server: SandboxServer) -> None:
    server.fail(422)
    with pytest.raises(EnvironmentFault, match=r"answered 422 to POST /run_code: .*asked"):
        client(server.url).run("print(1)")
    with pytest.raises(EnvironmentFault, match="answered 404 to POST /elsewhere/run_code"):
        client(server.url + "/elsewhere/").run("print(1)")
    assert not server.failures


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=r"failed 2 times in \d+ s, last: ConnectionR"):
            client(f"http://127.0.0.1:{port}", attempts=2).run("print(1)")


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "QUEUE_S", -0.7)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(EnvironmentFault, match=r"failed 1 times in \d+ s, last: .*timed out"):
            client(f"http://127.0.0.1:{silent.getsockname()[1]}", attempts=100).run("print(1)")
        assert 0.3 <= time.monotonic() - began < 20.0


def test_all_tries_together_have_one_deadline(
    server: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "QUEUE_S", -0.4)
    server.fail(*[503] * 100)
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"failed \d times in \d+ s, last: status 503"):
        client(server.url, attempts=100).run("print(1)")
    assert time.monotonic() - began < 20.0 and len(server.failures) > 90


def test_an_answer_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "QUEUE_S", -0.4)

    def drip(listener: socket.socket) -> None:
        with listener.accept()[0] as connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(1000):
                connection.sendall(b"x")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        dripping = threading.Thread(target=drip, args=(listener,))
        dripping.start()
        began = time.monotonic()
        with pytest.raises(EnvironmentFault, match=r"failed 1 times in \d+ s, last: TimeoutError"):
            client(f"http://127.0.0.1:{listener.getsockname()[1]}").run("print(1)")
        assert 0.6 <= time.monotonic() - began < 20.0
        dripping.join()


def test_an_address_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"sandbox.url='localhost:1'; expected http://HOST:PORT"):
        client("localhost:1")


def test_the_servers_words_are_the_originals() -> None:
    assert answer_of(Execution("1\n", "", "ok", 0.5)) == {
        "status": "Success",
        "message": "",
        "compile_result": None,
        "run_result": {
            "status": "Finished",
            "execution_time": 0.5,
            "return_code": 0,
            "stdout": "1\n",
            "stderr": "",
        },
        "executor_pod_name": None,
        "files": {},
    }
    late = answer_of(Execution("", "", "timeout", 1.0))
    assert late["status"] == "Failed" and late["run_result"]["status"] == "TimeLimitExceeded"
