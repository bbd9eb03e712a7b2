"""Which interpreter a local sandbox runs code with, and as which user."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from local_sandboxes import make_local

import megatron_spear
from megatron_spear.envs.sandbox import bubblewrap as bubblewrap_module
from megatron_spear.envs.sandbox.interpreter import SYSTEM_PYTHON, find_interpreter, open_to_all
from megatron_spear.errors import ConfigError, EnvironmentFault

ROOT = Path(megatron_spear.__file__).parents[1]


def test_an_interpreter_in_a_closed_folder(bubblewrap: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's folders are closed to the user that runs the code")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # only root can enter it
        made = Path(name) / "venv"
        subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--without-pip", made], check=True)
        package = next(made.glob("lib/python3*/site-packages")) / "of_the_environment.py"
        package.write_text("x = 5")
        assert not open_to_all(str(made))
        sandbox = make_local(python=str(made / "bin" / "python"), preload=("of_the_environment",))
        try:
            code = (
                "import sys, of_the_environment as o\nprint(o.x, sys.prefix)\nopen(o.__file__, 'w')"
            )
            execution = sandbox.run(code)
        finally:
            sandbox.close()
    assert execution.stdout == f"5 {made}\n"
    assert "Read-only file system" in execution.stderr or "Permission denied" in execution.stderr


def test_this_interpreter_with_its_packages(bubblewrap: None) -> None:
    sandbox = make_local(python=our_python(), preload=("numpy",))
    try:
        code = "import numpy as np\nprint(np.arange(4).sum(), np.random.rand())"
        outputs = [sandbox.run(code).stdout.split() for _ in range(2)]
    finally:
        sandbox.close()
    assert [x[0] for x in outputs] == ["6", "6"]
    assert outputs[0][1] != outputs[1][1]  # each has random numbers of its own


def test_a_user_without_rights_can_use_it(bubblewrap: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("the other tests run as such a user")
    if not (open_to_all(str(ROOT)) and open_to_all(SYSTEM_PYTHON)):
        pytest.skip(f"another user cannot read {ROOT}")
    version = subprocess.run([SYSTEM_PYTHON, "-V"], capture_output=True, text=True).stdout
    if not version.startswith(("Python 3.11", "Python 3.12", "Python 3.13")):
        pytest.skip(f"{SYSTEM_PYTHON} cannot run this package: {version.strip()}")
    program = (
        "from megatron_spear.envs.sandbox.local import LocalSandbox as L; s = L(python=None, "
        "jailed=True, workers=1, timeout_s=20.0, memory_mb=512, disk_mb=8, max_processes=32, "
        "max_output_chars=99, preload=()); print(s.run('import os; print(os.getuid())')); s.close()"
    )
    done = subprocess.run(
        [SYSTEM_PYTHON, "-B", "-c", program],
        capture_output=True,
        text=True,
        user=4711,
        group=4711,
        extra_groups=[],
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith("Execution(stdout='4711\\n', stderr='', status='ok'"), done


def test_what_is_missing_is_said(bubblewrap: None) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/python cannot be run: .*No such file"):
        make_local(python="/nowhere/python")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        (Path(name) / "python").symlink_to(SYSTEM_PYTHON)
        (Path(name) / "pyvenv.cfg").write_text("home = /usr/bin\n")
        with pytest.raises(ConfigError, match=r"expected a folder that is not in /tmp, /dev"):
            make_local(python=str(Path(name) / "python"))
    sandbox = make_local(preload=("no_such_module",))
    with pytest.raises(EnvironmentFault, match=r"cannot start: ModuleNotFoundError: .*no_such"):
        sandbox.run("print(1)")
    sandbox.close()


def test_an_interpreter_that_is_too_old(temporary: Path) -> None:
    old = temporary / "python"
    old.write_text('#!/bin/sh\necho \'[[3, 7], "/x/python", "/x", "/x", "/x"]\'\n')
    old.chmod(0o755)
    with pytest.raises(ConfigError, match=r"is Python 3\.7; expected 3\.8 or newer"):
        make_local(python=str(old))


def test_the_folders_of_an_interpreter() -> None:
    system = find_interpreter(None)
    assert system.folders == () or default_is_ours()
    ours = find_interpreter(our_python())
    assert ours.program == our_python()
    assert any(ours.program.startswith(folder + "/") for folder in ours.folders)
    assert os.path.realpath(sys.base_prefix) in ours.folders or sys.base_prefix == "/usr"


def our_python() -> str:
    """The interpreter of these tests by its real place."""
    place = Path(sys.prefix).resolve() / "bin" / "python"
    if str(place).startswith("/tmp/"):
        pytest.skip("an interpreter in /tmp is not to be seen in a sandbox")
    return str(place)


def default_is_ours() -> bool:
    """Whether there is no interpreter of the system."""
    return not os.access(SYSTEM_PYTHON, os.X_OK)


def test_nobody_is_taken_only_where_nobody_exists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert bubblewrap_module.user_without_rights() is None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for users, expected in (("0 0 4294967295", 65534), ("0 1000 1", None)):
        (tmp_path / "uid_map").write_text(users)
        monkeypatch.setattr(bubblewrap_module, "Path", lambda _: tmp_path / "uid_map")
        assert bubblewrap_module.user_without_rights() == expected
