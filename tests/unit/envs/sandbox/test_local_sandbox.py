"""The local sandbox: what an execution says, workers that come and go, nothing that stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from local_sandboxes import make_local

import megatron_spear
from megatron_spear.envs.sandbox import local
from megatron_spear.envs.sandbox.execution import Execution
from megatron_spear.envs.sandbox.local import LocalSandbox
from megatron_spear.errors import EnvironmentFault

ROOT = Path(megatron_spear.__file__).parents[1]


def children() -> set[int]:
    """Processes below ours, at any depth."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except OSError:
                continue
            parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {os.getpid()}


@pytest.fixture(params=["jailed", "plain"])
def either(request: pytest.FixtureRequest) -> LocalSandbox:
    """The default sandbox, and one of plain processes: both say the same."""
    made: LocalSandbox = request.getfixturevalue(
        {"jailed": "sandbox", "plain": "plain"}[request.param]
    )
    return made


@pytest.mark.usefixtures("bubblewrap")
@pytest.mark.parametrize("jailed", [True, False])
def test_signals_that_an_environment_worker_ignores_end_a_program(jailed: bool) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    made = make_local(jailed=jailed)
    try:
        program = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)"
        assert made.run(program).status == "killed"
        assert made.run("print(1)").stdout == "1\n", "the worker itself ignores it"
    finally:
        made.close()
        signal.signal(signal.SIGTERM, before)


def test_output_and_time(either: LocalSandbox) -> None:
    execution = either.run("import sys\nprint(6 * 7)\nprint('so', file=sys.stderr)")
    assert (execution.stdout, execution.stderr, execution.status) == ("42\n", "so\n", "ok")
    assert 0.0 < execution.time_s < 20.0


def test_a_traceback_shows_the_lines_of_the_code_alone(either: LocalSandbox) -> None:
    execution = either.run("def f(x):\n    return 1 / x\n\nf(0)")
    assert execution.status == "error"
    assert execution.stderr.startswith('Traceback (most recent call last):\n  File "code.py", line')
    assert "return 1 / x" in execution.stderr and execution.stderr.count("File") == 2
    assert execution.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("code", "status", "stderr"),
    [
        ("raise SystemExit", "ok", ""),
        ("raise SystemExit(3)", "error", "exit status 3"),
        ("import sys; sys.exit('why')", "error", "why\n"),
        ("import os; os._exit(0)", "ok", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGUSR1)", "killed", "ended by SIGUSR1"),
        ("import os; os.kill(os.getpid(), 40)", "killed", "ended by signal 40"),
    ],
)
def test_how_it_ended(either: LocalSandbox, code: str, status: str, stderr: str) -> None:
    execution = either.run(code)
    assert (execution.status, execution.stderr) == (status, stderr)


def test_it_is_a_script_like_any_other(either: LocalSandbox) -> None:
    code = """
import __main__, atexit, dataclasses, os, pickle, sys, threading
if __name__ == "__main__":
    @dataclasses.dataclass
    class Point:
        x: int
    print(pickle.loads(pickle.dumps(Point(3))), __main__.Point is Point, sys.argv)
    open("helper.py", "w").write("y = 5")
    import helper
    print(helper.y, os.getcwd() == sys.path[0], os.listdir("."))
    threading.Timer(0.05, print, ["a thread"]).start()
    atexit.register(print, "the end")
"""
    lines = either.run(code).stdout.splitlines()
    assert lines[0] == "Point(x=3) True ['code.py']"
    assert lines[1] == "5 True ['helper.py']" and lines[2:] == ["a thread", "the end"]


def test_processes_threads_and_loops_of_the_library(either: LocalSandbox) -> None:
    code = """
import asyncio, multiprocessing, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        print(pool.map(abs, [-1, -2]))
    print(list(ThreadPoolExecutor(3).map(abs, [-3])), asyncio.run(asyncio.sleep(0, 4)))
    print(subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True).stdout)
    print(open("/dev/stdout", "w").write("direct\\n"))
"""
    execution = either.run(code)
    assert execution.stdout == "[1, 2]\n[3] 4\nb'5\\n'\ndirect\n7\n", execution


def test_long_outputs_are_cut_and_say_so(either: LocalSandbox) -> None:
    code = "import sys\nprint('a' * 5000 + 'b' * 9000)\nsys.stderr.write('c' * 9000 + 'd' * 5000)"
    execution = either.run(code)
    assert execution.stdout == "a" * 5000 + "b" * 5000 + "\n[cut here: 14,001 bytes in all]"
    assert execution.stderr == "[cut here: 14,000 bytes in all]\n" + "c" * 5000 + "d" * 5000
    wide = either.run("print('é€' * 200_000)")
    assert wide.stdout == "é€" * 5000 + "\n[cut here: 1,000,001 bytes in all]"


def test_what_was_printed_before_the_deadline_is_kept(short: LocalSandbox) -> None:
    execution = short.run("print('before')\nwhile True: pass")
    assert execution.stdout == "before\n" and execution.status == "timeout"
    assert execution.stderr == "stopped after 1 s" and 1.0 <= execution.time_s < 20.0


def test_plain_processes_are_ended_too(temporary: Path) -> None:
    before = children()
    sandbox = make_local(jailed=False, timeout_s=1.0)
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: "
    assert sandbox.run(daemon + "time.sleep(99)\n    os._exit(0)").status == "ok"
    assert len(children() - before) == 1  # the worker
    assert sandbox.run("while True: pass").status == "timeout"
    assert sandbox.run("import os; os.kill(os.getppid(), 9)").status == "killed"
    assert sandbox.run("print(1)").stdout == "1\n"
    sandbox.close()
    assert children() <= before
    assert list(temporary.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's folders are closed to the user that runs the code")
    temporary.chmod(0o700)
    sandbox = make_local(jailed=False)
    with pytest.raises(EnvironmentFault, match="cannot run code: PermissionError"):
        sandbox.run("print(1)")
    sandbox.close()


def test_after_a_thousand_executions_nothing_is_left(bubblewrap: None, temporary: Path) -> None:
    processes, mounts = children(), Path("/proc/self/mountinfo").read_text()
    files = os.listdir("/proc/self/fd")
    sandbox = make_local()
    for number in range(1000):
        execution = sandbox.run(f"open('/tmp/{number}', 'w').write('x')\nprint({number})")
        assert execution.stdout == f"{number}\n", execution
        if number % 100 == 99:  # among them some that do not end by themselves
            daemon = "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(99)"
            assert sandbox.run(daemon).status == "ok"
    seen = "import os\nprint(len([n for n in os.listdir('/proc') if n.isdigit()]))\n"
    assert sandbox.run(seen + "print(os.listdir('/tmp'))").stdout == "2\n[]\n"
    assert len(children() - processes) == 2  # bubblewrap, the worker
    sandbox.close()
    with pytest.raises(EnvironmentFault, match="closed"):
        sandbox.run("print(1)")
    assert children() <= processes
    assert os.listdir("/proc/self/fd") == files
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert list(temporary.iterdir()) == []


def test_a_worker_that_is_gone_is_replaced(bubblewrap: None) -> None:
    sandbox = make_local()
    try:
        sandbox.run("")
        (worker,) = sandbox._idle
        os.kill(worker.pid, signal.SIGKILL)
        assert sandbox.run("print(1)").stdout == "1\n"
        (other,) = sandbox._idle
        timer = threading.Timer(0.5, os.kill, (other.pid, signal.SIGKILL))
        timer.start()
        execution = sandbox.run("import time; time.sleep(2); print(2)")  # once more, and it is done
        assert execution.stdout == "2\n" and execution.status == "ok"
    finally:
        sandbox.close()


def test_a_worker_that_hangs_is_replaced(
    bubblewrap: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 1.0)
    before = children()
    sandbox = make_local(timeout_s=1.0)
    try:
        sandbox.run("")
        for pid in children() - before:
            os.kill(pid, signal.SIGSTOP)
        execution = sandbox.run("print(1)")
        assert (execution.stdout, execution.status) == ("", "timeout")
        assert "hung" in caplog.text
        assert sandbox.run("print(1)").stdout == "1\n"
    finally:
        sandbox.close()
    assert children() <= before


def test_workers_run_at_the_same_time(bubblewrap: None) -> None:
    sandbox = make_local(workers=2)
    sandbox._idle += [sandbox._starter.submit(sandbox._start).result() for _ in range(2)]
    found: list[Execution] = []
    code = "import time; a = time.time(); time.sleep(2); print(a, time.time())"
    threads = [threading.Thread(target=lambda: found.append(sandbox.run(code))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sandbox.close()
    times = sorted(tuple(map(float, x.stdout.split())) for x in found)
    assert times[1][0] < times[0][1]  # two of them overlap
    assert times[2][0] >= min(times[0][1], times[1][1])  # the third waits for one


def _wait(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.05)
    return False


def test_it_ends_with_the_process_that_it_belongs_to(bubblewrap: None) -> None:
    program = (
        "from local_sandboxes import make_local; s = make_local(timeout_s=99.0); s.run(''); "
        "print('up', flush=True); s.run('import os, time; os.fork(); time.sleep(90)')"
    )
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    before = children()
    owner = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    assert _wait(lambda: len(children() - before - {owner.pid}) == 4)  # two of them the script's
    below = children() - before - {owner.pid}
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def test_a_bubblewrap_that_cannot_start(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    fake = temporary / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a namespace' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{temporary}:{os.environ['PATH']}")
    before = children()
    sandbox = make_local()
    with pytest.raises(EnvironmentFault, match="cannot start: bwrap: No permissions to create"):
        sandbox.run("print(1)")
    sandbox.close()
    assert children() <= before


def test_a_script_that_cannot_be_shut_in_is_not_run(bubblewrap: None) -> None:
    sandbox = make_local()
    sandbox._config["call_filter"] = "00" * 8  # no filter that a kernel takes
    for _ in range(2):
        with pytest.raises(EnvironmentFault, match=r"cannot run code: OSError: .*SECCOMP"):
            sandbox.run("print(1)")
    sandbox.close()
