"""Nothing that a script tries gets out of the sandbox, breaks it or stays behind."""

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from escape_attempts import ATTEMPTS, Attempt
from hostile_texts import LEFT_BEHIND, TEXTS

import megatron_spear
from megatron_spear.envs.sandbox.execution import Execution
from megatron_spear.envs.sandbox.local import LocalSandbox

OUTSIDE = {  # attempts whose way out is open to a plain process: they can tell an escape
    "a server of this machine",
    "an abstract socket",
    "users",
    "the project",
    "a file of another user",
    "every folder of site-packages",
    "what is in /dev",
    "the keyrings",
    "watching other folders",
    "other processes",
    "the host's name",
    "another program",
}


@pytest.fixture(scope="module")
def outside() -> Iterator[Mapping[str, str]]:
    """What is to be found outside, by the names that the attempts use."""
    secret = secrets.token_hex(16)
    abstract = f"spear-{secrets.token_hex(8)}"
    with (
        tempfile.TemporaryDirectory(prefix="outside-") as name,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as hidden,
        socket.socket(socket.AF_UNIX) as visible,
    ):
        folder = Path(name)
        folder.chmod(0o777)  # open to all: only the walls of the sandbox keep a script out
        (folder / "secret").write_text(secret)
        hidden.bind(f"\0{abstract}")
        visible.bind(str(folder / "socket"))
        for listener in (hidden, visible):
            listener.listen()
        os.environ["SPEAR_SECRET"] = secret
        project = Path(megatron_spear.__file__).resolve()
        yield {
            "port": str(server.getsockname()[1]),
            "abstract": abstract,
            "socket": str(folder / "socket"),
            "secret_file": str(folder / "secret"),
            "secret": secret,
            "project": str(project),
            "mark": str(folder / "mark"),
        }
        del os.environ["SPEAR_SECRET"]


def fill(code: str, outside: Mapping[str, str]) -> str:
    """The script with what is outside in the place of its names."""
    for name, value in outside.items():
        code = code.replace(f"{{{{{{{name}}}}}}}", value)
    assert "{{{" not in code
    return code


def works(sandbox: LocalSandbox) -> bool:
    """Whether the next script runs, with nobody else there."""
    code = "import os\nprint([n for n in os.listdir('/proc') if n.isdigit()], os.listdir('/tmp'))"
    execution = sandbox.run(code)
    return execution.status == "ok" and len(execution.stdout.split()) == 3


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=[a.name for a in ATTEMPTS])
def test_no_way_out(
    attempt: Attempt,
    sandbox: LocalSandbox,
    short: LocalSandbox,
    small: LocalSandbox,
    outside: Mapping[str, str],
) -> None:
    used = sandbox
    if attempt.short:
        used = small if attempt.ends == ("memory",) else short
    execution = used.run(fill(attempt.code, outside))
    assert execution.status in attempt.ends, execution
    assert "ESCAPED" not in execution.stdout, execution
    assert outside["secret"] not in execution.stdout + execution.stderr
    if attempt.held:
        assert "held" in execution.stdout, execution
    assert len(execution.stdout) + len(execution.stderr) < 21_000
    assert not Path(outside["mark"]).exists()
    assert works(used)


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_a_plain_process_gets_out(
    name: str, plain: LocalSandbox, outside: Mapping[str, str]
) -> None:
    (attempt,) = [a for a in ATTEMPTS if a.name == name]
    execution = plain.run(fill(attempt.code, outside))
    assert "ESCAPED" in execution.stdout or "AssertionError" in execution.stderr, execution


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_nothing_is_left_for_the_next(name: str, sandbox: LocalSandbox) -> None:
    first, second = LEFT_BEHIND[name]
    assert sandbox.run(first).status == "ok"
    execution = sandbox.run(second)
    assert execution.status == "error" and "evil" not in execution.stdout, execution
    assert works(sandbox)


def test_an_earlier_script_is_not_in_memory(sandbox: LocalSandbox) -> None:
    half = secrets.token_hex(8)
    sandbox.run(f"s = '{half}' + 'y'  # {half}x\nprint(s); import sys; print(s, file=sys.stderr)")
    search = f"""
import re
found = []
needle = re.compile(b'{half[:8]}(?:{half[8:]})[xyz]')
mine = ('z' + '{half[8:]}'[::-1] + '{half[:8]}'[::-1])[::-1]  # this one is there
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as memory:
    for line in maps:
        area, rights = line.split()[:2]
        begin, end = (int(x, 16) for x in area.split('-'))
        if 'r' in rights and begin < 1 << 47:
            try:
                memory.seek(begin)
                found += needle.findall(memory.read(end - begin))
            except OSError:
                pass
print(len(mine), {{x[-1:] for x in found}})
"""
    execution = sandbox.run(search)
    assert execution.stdout == "17 {b'z'}\n", execution


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_gives_an_execution(name: str, sandbox: LocalSandbox) -> None:
    execution = sandbox.run(TEXTS[name])
    assert isinstance(execution, Execution) and execution.time_s < 30.0
    assert len(execution.stdout) + len(execution.stderr) < 21_000
    (execution.stdout + execution.stderr).encode("utf-8")  # no half characters
    assert works(sandbox)
