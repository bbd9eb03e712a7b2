"""Which sandbox the settings give, and what is said where it cannot run."""

import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_spear.config.environments.sandbox import SandboxSection
from megatron_spear.envs.sandbox import make
from megatron_spear.envs.sandbox.local import LocalSandbox
from megatron_spear.envs.sandbox.make import check_sandbox, make_sandbox
from megatron_spear.errors import ConfigError, EnvironmentFault
from megatron_spear.testing.sandbox_server import SandboxServer


@pytest.fixture
def no_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without it."""
    monkeypatch.setenv("PATH", str(tmp_path))


def test_the_defaults_run_code(bubblewrap: None) -> None:
    check_sandbox(SandboxSection())
    sandbox = make_sandbox(SandboxSection().model_dump())
    assert sandbox.run("print(open('/proc/self/status').read())").stdout.count("Seccomp:\t2") == 1
    sandbox.close()


def test_without_bubblewrap_no_code_is_run(no_bubblewrap: None) -> None:
    with pytest.raises(ConfigError, match=r"apt-get install bubblewrap.*sandbox.unsafe=true"):
        make_sandbox(SandboxSection().model_dump())
    with pytest.raises(ConfigError, match="bubblewrap is not installed"):
        check_sandbox(SandboxSection())


def test_unsafe_runs_it_and_says_so(no_bubblewrap: None, caplog: pytest.LogCaptureFixture) -> None:
    options = SandboxSection(unsafe=True).model_dump()
    with caplog.at_level(logging.WARNING):
        first, second = make_sandbox(options), make_sandbox(options)
    assert [first.run("print(1)").stdout, second.run("print(2)").stdout] == ["1\n", "2\n"]
    said = [r.getMessage() for r in caplog.records if "unsafe" in r.getMessage()]
    assert len(said) == 1 and "plain processes" in said[0] and "not installed" in said[0]
    first.close()
    second.close()


def test_unsafe_is_still_safe_where_bubblewrap_works(
    bubblewrap: None, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox = make_sandbox(SandboxSection(unsafe=True).model_dump())
    assert sandbox.run("import socket; print(socket.gethostname())").stdout == "sandbox\n"
    assert not caplog.records
    sandbox.close()


def test_unsafe_where_bubblewrap_cannot_start(
    bubblewrap: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: LocalSandbox, code: str) -> None:
        raise EnvironmentFault("no namespaces here")

    with monkeypatch.context() as patched:
        patched.setattr(LocalSandbox, "run", refuse)
        sandbox = make_sandbox(SandboxSection(unsafe=True).model_dump())
        with pytest.raises(ConfigError, match="no namespaces here; install bubblewrap"):
            check_sandbox(SandboxSection())
    assert "no namespaces here" in caplog.text
    assert sandbox.run("import socket; print(socket.gethostname())").stdout != "sandbox\n"
    sandbox.close()


def test_equal_sandboxes_are_one_until_the_last_is_closed(bubblewrap: None) -> None:
    options = SandboxSection().model_dump()
    first, second = make_sandbox(options), make_sandbox(dict(options))
    other = make_sandbox(SandboxSection(memory_mb=512).model_dump())
    pid = "import os; print(os.getppid(), os.stat('/proc/self/ns/pid').st_ino)"
    assert len({s.run(pid).stdout for s in (first, second, first)}) == 1
    assert other.run(pid).stdout != first.run(pid).stdout
    first.close()
    first.close()
    assert second.run("print(1)").stdout == "1\n"
    with pytest.raises(EnvironmentFault, match="closed"):
        first.run("print(1)")
    second.close()
    other.close()
    assert make._shared == {}


def test_a_server_is_checked(bubblewrap: None) -> None:
    local = make_sandbox(SandboxSection().model_dump())
    with SandboxServer(local) as server:
        check_sandbox(SandboxSection(backend="sandbox_fusion", url=server.url))
        url = server.url
    local.close()
    section = SandboxSection(backend="sandbox_fusion", url=url, request_attempts=1)
    with pytest.raises(ConfigError, match=rf"expected a SandboxFusion server at .*{url}"):
        check_sandbox(section)


def test_limits_that_leave_no_room_are_said(bubblewrap: None) -> None:
    with pytest.raises(ConfigError, match=r"answered print\(6 \* 7\) with .*timeout_s"):
        check_sandbox(SandboxSection(timeout_s=1e-6))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "sandbox_fusion"}, "url='' with backend=sandbox_fusion; expected http://"),
        ({"url": "http://a:1"}, "url='http://a:1' is not used with backend=local"),
        (
            {"backend": "sandbox_fusion", "url": "http://a:1", "unsafe": True},
            "unsafe=True is not used with backend=sandbox_fusion",
        ),
        ({"memory_mb": 8}, "greater than or equal to 64"),
        ({"timeout_s": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as error:
        SandboxSection(**changes)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_each_setting_is_read() -> None:
    source = Path(make.__file__).read_text(encoding="utf-8")
    for name in SandboxSection.model_fields:
        assert f"settings.{name}" in source, name
