"""The setup scripts with a stub for Python and pip: what is asked of pip, and what the user sees.

The stub answers what the scripts ask Python before anything is installed, writes down each call of
pip and passes everything else on to the real Python.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
CONSTRAINTS = (TOOLS / "constraints-cpu.txt").read_text().splitlines()
(PINNED,) = (line for line in CONSTRAINTS if line.startswith("torch=="))
INDEX = "https://example.org/cpu"
WHEEL = "https://example.org/torch-2+cpu.whl"

STUB = f"""#!/usr/bin/env bash
case "$*" in
    *version_info*) echo "${{STUB_VERSION:-3.11}}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-c import torch") exit 1 ;;
    "pip install "*) echo "uv $*" >> "$STUB_CALLS"; exit "${{STUB_UV_STATUS:-0}}" ;;
    *"megatron.core as m"*) echo 0.19.2 ;;
    *"import sglang"* | *"import vllm"*)
        if [ -n "${{STUB_ERROR:-}}" ]; then echo "$STUB_ERROR"; exit 1; fi ;;
    "-m pip "*)
        echo "${{*:3}}" >> "$STUB_CALLS"
        case "$*" in
            *--dry-run*) cat "$STUB_REPORT" ;;
            *" uv") cp "$0" "${{0%/*}}/uv" ;;
            *--target*) echo "no route to the index" >&2; exit 1 ;;
            *)
                echo "Collecting torch"
                echo "  Downloading torch-2.whl.metadata (5 kB)"
                echo "  Downloading torch-2.whl (190 MB)"
                echo "Installing collected packages: mpmath, sympy, torch"
                ;;
        esac ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], list[str]]:
    """What pip was called with so far."""

    def read() -> list[str]:
        file = tmp_path / "calls"
        return file.read_text().splitlines() if file.exists() else []

    return read


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run("setup_env.sh", requires=[...], SPEAR_CPU_INDEX="...")``: a script with the stub.

    It makes ``tmp_path / "venv"``, which the engines' scripts take as their argument.
    """
    python = tmp_path / "python3.11"
    python.write_text(STUB)
    python.chmod(0o755)

    def start(
        script: str,
        requires: tuple[str, ...] = ("filelock", "nvidia-x; extra == 'all'"),
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        found = {"metadata": {"requires_dist": list(requires)}, "download_info": {"url": WHEEL}}
        report = {"install": [found]}
        (tmp_path / "report").write_text(json.dumps(report))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SPEAR_", "MEGATRON_"))}
        kept |= {
            "SPEAR_PYTHON": str(python),
            "SPEAR_VENV": str(tmp_path / "venv"),
            "STUB_CALLS": str(tmp_path / "calls"),
            "STUB_REPORT": str(tmp_path / "report"),
        }
        return subprocess.run(
            [str(TOOLS / script), *([kept["SPEAR_VENV"]] if "_cpu/" in script else [])],
            env=kept | env,
            capture_output=True,
            text=True,
            check=False,
        )

    return start


def test_setup_stops_before_gigabytes_of_cuda(run: Run, calls: Callable[[], list[str]]) -> None:
    done = run("setup_env.sh", ("filelock", "nvidia-cublas"))
    assert done.returncode == 2
    assert "several gigabytes would be downloaded" in done.stderr
    assert "SPEAR_CPU_INDEX=https://download.pytorch.org/whl/cpu" in done.stderr
    (looked_up,) = calls()
    assert "--dry-run" in looked_up and "--index-url" not in looked_up


@pytest.mark.parametrize(
    ("requires", "env"),
    [
        (("filelock", "nvidia-x; extra == 'all'"), {"SPEAR_CPU_INDEX": INDEX}),
        (("nvidia-cublas",), {"SPEAR_ALLOW_CUDA": "1"}),
    ],
)
def test_setup_installs_and_says_what_it_does(
    requires: tuple[str, ...],
    env: dict[str, str],
    run: Run,
    calls: Callable[[], list[str]],
    tmp_path: Path,
) -> None:
    done = run("setup_env.sh", requires, **env)
    assert done.returncode == 0, done.stderr
    looked_up, torch, tools, rest, templates = calls()
    asked_index = "SPEAR_CPU_INDEX" in env
    for call in (looked_up, torch):
        assert (f"--index-url {INDEX}" in call) == asked_index, "torch alone comes from it"
    assert "--index-url" not in tools + rest + templates
    assert "--no-deps" in templates and " trl==" in templates
    assert torch.endswith(f" {PINNED}") and rest.endswith(" -e .[dev]")
    assert all("--constraint tools/constraints-cpu.txt" in call for call in calls()[1:])
    shown = done.stdout.splitlines()
    pip_says = ["setup:   Downloading torch-2.whl (190 MB)", "setup:   Installing 3 packages"]
    assert shown[0] == f"setup: looking up {PINNED}"
    assert shown[1] == f"setup: 1 of 4: {PINNED} (about 200 MB)" and shown[2:4] == pip_says
    assert [x for x in shown if " of 4: " in x][1:] == [
        "setup: 2 of 4: setuptools",
        "setup: 3 of 4: the other dependencies and megatron_spear",
        "setup: 4 of 4: trl, for the chat templates in it (its dependencies are left out)",
    ]
    assert shown[-1] == f"setup: done ({tmp_path / 'venv'})"
    again = run("setup_env.sh", requires, **env)
    assert (again.returncode, again.stdout, len(calls())) == (0, "", 5)


def test_setup_with_uv_takes_the_torch_that_pip_found(
    run: Run, calls: Callable[[], list[str]], tmp_path: Path
) -> None:
    done = run("setup_env.sh", SPEAR_UV="1", SPEAR_CPU_INDEX=INDEX)
    assert done.returncode == 0, done.stderr
    uv, looked_up, torch, tools, rest, templates = calls()
    assert uv.endswith(" install --quiet --constraint tools/constraints-cpu.txt uv")
    assert "--dry-run" in looked_up
    python = tmp_path / "venv" / "bin" / "python"
    common = f"uv pip install --quiet --python {python} --constraint tools/constraints-cpu.txt "
    assert torch == common + WHEEL and tools == f"{common}setuptools"
    assert rest == f"{common}--no-build-isolation -e .[dev]"
    assert templates.startswith(f"{common}--no-deps trl==")


def test_setup_goes_on_with_pip_where_uv_fails(run: Run, calls: Callable[[], list[str]]) -> None:
    done = run("setup_env.sh", SPEAR_UV="1", STUB_UV_STATUS="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("setup: uv could not (see above); pip goes on") == 1
    by_uv = [call for call in calls() if call.startswith("uv ")]
    assert len(by_uv) == 1 and by_uv[0].endswith(WHEEL)
    torch, *_, rest, templates = [call for call in calls() if not call.startswith("uv ")][2:]
    assert torch.endswith(f" {WHEEL}") and rest.endswith(" -e .[dev]") and " trl==" in templates


def test_setup_refuses_another_python(run: Run, calls: Callable[[], list[str]]) -> None:
    done = run("setup_env.sh", STUB_VERSION="3.12")
    assert done.returncode == 2 and not calls()
    assert "found Python 3.12" in done.stderr and "SPEAR_PYTHON=" in done.stderr


ENGINES = ["sglang", "vllm"]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_environment_is_made_step_by_step(
    engine: str, run: Run, calls: Callable[[], list[str]], tmp_path: Path
) -> None:
    script, folder = f"{engine}_cpu/setup.sh", tmp_path / "venv"
    done = run(script, SPEAR_CPU_INDEX=INDEX)
    assert done.returncode == 0, done.stderr
    first, *steps, last = done.stdout.splitlines()
    assert (first, last) == (f"{engine}: 1. a virtual environment", f"{engine}: done ({folder})")
    assert [step.split(".")[0] for step in steps] == [
        f"{engine}: {number}" for number in range(2, 2 + len(steps))
    ]
    looked_up, torch, rest = calls()
    assert "--dry-run" in looked_up and f"--index-url {INDEX}" in torch
    assert torch.endswith(f" {PINNED}") and rest.endswith(f"/{engine}_cpu/requirements.txt")
    assert all("--no-deps" in call for call in (torch, rest))
    stubs = {path.name for path in (folder / "lib").rglob("*.py")}
    assert stubs == ({"sitecustomize.py", "__init__.py"} if engine == "sglang" else set())
    again = run(script)
    assert (again.returncode, again.stdout, len(calls())) == (0, "", 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_environment_names_the_step_that_failed(engine: str, run: Run) -> None:
    done = run(f"{engine}_cpu/setup.sh", STUB_ERROR="no module named x")
    assert done.returncode == 1 and "done" not in done.stdout
    shown = done.stderr.splitlines()
    assert shown[0] == "no module named x"
    assert shown[1].startswith(f"{engine}: step {5 if engine == 'sglang' else 4} (a look whether")
    assert run(f"{engine}_cpu/setup.sh").returncode == 0, "a failed environment is no finished one"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_environment_is_never_of_cuda(
    engine: str, run: Run, calls: Callable[[], list[str]]
) -> None:
    done = run(f"{engine}_cpu/setup.sh", ("nvidia-cublas",), SPEAR_ALLOW_CUDA="1")
    assert done.returncode == 2 and len(calls()) == 1
    assert "SPEAR_CPU_INDEX=https://download.pytorch.org/whl/cpu" in done.stderr


def test_a_second_megatron_that_cannot_be_installed_is_an_error(run: Run) -> None:
    done = run("test_megatron_019.sh")
    assert done.returncode == 1
    assert "no route to the index" in done.stderr
    assert "nothing was tested with them" in done.stderr
    assert "MEGATRON_SPEAR_SKIP_019=1" in done.stderr


def test_the_second_megatron_can_be_left_out(run: Run, calls: Callable[[], list[str]]) -> None:
    done = run("test_megatron_019.sh", MEGATRON_SPEAR_SKIP_019="1")
    assert done.returncode == 0 and "skipped" in done.stderr
    assert not calls()
