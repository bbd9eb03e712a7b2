"""The job script: its header, and what it calls, run by bash with programs that take notes."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_spear.cluster.attempt import BAD_NODES_NAME
from megatron_spear.cluster.slurm import excluded, render, slurm_problems
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig

FOLDER = Path("/shared/work")
"""Of the launch."""

_NOTE = """#!{python}
import json, os, sys
with open({notes!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
words = sys.argv[1:]
if "begin" in words:
    print({attempt!r})
if "show" in words:
    print("JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1")
if "end" in words:
    sys.exit({verdict})
for phase, status in {statuses}.items():
    if phase in words:
        sys.exit(status)
"""


@dataclass(frozen=True)
class Ran:
    """Exit status of a script, and each call it made, as a list of words."""

    status: int
    calls: list[list[str]]

    def of(self, command: str) -> list[str]:
        """The one call of ``launch COMMAND``."""
        (call,) = [call for call in self.calls if ("launch", command) in pairwise(call)]
        return call


@dataclass(frozen=True)
class Cluster:
    """A folder of programs that note how they are called."""

    folder: Path

    @property
    def attempt(self) -> Path:
        return self.folder / "attempt_0"

    def run(self, config: RunConfig, *, verdict: int = 0, **statuses: int) -> Ran:
        """Render and run a script: ``launch end`` exits with ``verdict``, steps with theirs."""
        programs, notes = self.folder / "bin", self.folder / "notes"
        programs.mkdir(exist_ok=True)
        self.attempt.mkdir(exist_ok=True)
        text = _NOTE.format(
            python=sys.executable,
            notes=str(notes),
            attempt=str(self.attempt),
            verdict=verdict,
            statuses=statuses,
        )
        for name in ("srun", "scontrol", "apptainer", "python"):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        script = self.folder / "job.sbatch"
        script.write_text(render(config, config.run.dir, FOLDER))
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        done = subprocess.run(["bash", str(script)], env=environment, timeout=60, check=False)
        calls = [json.loads(line) for line in notes.read_text().splitlines()]
        return Ran(done.returncode, calls)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def _config(*settings: str, run: str = "/shared/run") -> RunConfig:
    return load_config(None, [f"run.dir={run}", *settings])


def _options(config: RunConfig) -> list[str]:
    lines = render(config, config.run.dir, FOLDER).splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def test_the_header_asks_for_the_nodes_of_both_roles() -> None:
    options = _options(
        _config(
            "run.name=try",
            "cluster.trainer_nodes=3",
            "cluster.engine_nodes=2",
            "cluster.gpus_per_node=8",
            "cluster.slurm.partition=big",
            "cluster.slurm.account=lab",
            "cluster.slurm.qos=high",
            "cluster.slurm.time_limit=2-00:00:00",
            "cluster.slurm.signal_before_s=900",
            "cluster.slurm.exclude=[n3, n7]",
            "cluster.slurm.options=[--constraint=h100, --reservation=us]",
        )
    )
    assert options[0].startswith("--job-name=try-")
    assert options[1:] == [
        "--nodes=5",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
        "--gpus-per-node=8",
        "--time=2-00:00:00",
        "--signal=B:USR1@900",
        "--requeue",
        "--open-mode=append",
        "--dependency=singleton",
        "--output=/shared/run/job-%j.log",
        "--partition=big",
        "--account=lab",
        "--qos=high",
        "--exclude=n3,n7",
        "--constraint=h100",
        "--reservation=us",
    ]
    assert not any("gpus" in option for option in _options(_config()))


def test_runs_of_one_name_do_not_wait_for_each_other() -> None:
    one, other = (_options(_config(f"run.dir=/shared/{seed}"))[0] for seed in (1, 2))
    assert one != other
    assert one == _options(_config("run.dir=/shared/1"))[0]


def test_nodes_that_were_found_bad_stay_out(tmp_path: Path) -> None:
    config = _config("cluster.slurm.exclude=[n3]", run=str(tmp_path))
    (tmp_path / BAD_NODES_NAME).write_text("n9\nn3\n")
    assert excluded(config.cluster, tmp_path) == "n3,n9"
    assert "--exclude=n3,n9" in _options(config)


def test_what_is_exported() -> None:
    network = "{interface: ib0, ib_hca: mlx5, environment: {NVTE_DEBUG: '1'}}"
    script = render(_config(f"cluster.network={network}"), Path("/run"), FOLDER)
    for line in (
        "export NCCL_SOCKET_IFNAME=ib0",
        "export GLOO_SOCKET_IFNAME=ib0",
        "export NCCL_IB_HCA=mlx5",
        "export NVTE_DEBUG=1",
    ):
        assert line in script.splitlines()


def test_the_calls_of_a_run_to_its_end(cluster: Cluster) -> None:
    config = _config(f"cluster.runtime.path={cluster.folder}", "cluster.preflight.deadline_s=99.5")
    ran = cluster.run(config)
    launch = [f"{cluster.folder}/bin/python", "-m", "megatron_spear.cli.main", "launch"]
    everywhere = ["--ntasks-per-node=1", "--cpu-bind=none", "--label"]
    attempt = ["--attempt", str(cluster.attempt)]
    assert ran.status == 0
    assert ran.calls == [
        ["python", *launch[1:], "begin", "/shared/run"],
        ["srun", *everywhere, "--kill-on-bad-exit=0", "--wait=100", *launch, "preflight", *attempt],
        ["srun", *everywhere, "--kill-on-bad-exit=1", "--wait=0", *launch, "node", *attempt],
        ["python", *launch[1:], "end", *attempt, "--phase", "node", "--status", "0", "--told", ""],
    ]


def test_without_a_preflight(cluster: Cluster) -> None:
    off = "cluster.preflight.enabled=false"
    ran = cluster.run(_config(f"cluster.runtime.path={cluster.folder}", off))
    assert [call[0] for call in ran.calls] == ["python", "srun", "python"]
    assert "node" in ran.calls[1]


def test_a_failed_preflight_starts_nothing_and_bad_nodes_are_left_out(cluster: Cluster) -> None:
    cluster.attempt.mkdir()
    (cluster.attempt / "exclude").write_text("n3,n7")
    config = _config(f"cluster.runtime.path={cluster.folder}")
    ran = cluster.run(config, verdict=10, preflight=3)
    assert not [call for call in ran.calls if "node" in call]
    assert ran.of("end")[-6:] == ["--phase", "preflight", "--status", "3", "--told", ""]
    assert [call[1:] for call in ran.calls[-2:]] == [
        ["requeue", "7"],
        ["update", "JobId=7", "ExcNodeList=n3,n7"],
    ]


def test_a_run_that_is_given_up_is_not_requeued(cluster: Cluster) -> None:
    config = _config(f"cluster.runtime.path={cluster.folder}")
    ran = cluster.run(config, verdict=1, node=137)
    assert ran.status == 1
    assert "137" in ran.of("end") and "scontrol" not in {call[0] for call in ran.calls}


def test_a_container_of_pyxis(cluster: Cluster) -> None:
    runtime = "{type: pyxis, image: 'reg#nv/x:1', mounts: ['/a b:/c']}"
    ran = cluster.run(_config(f"cluster.runtime={runtime}"))
    container = [
        "--container-image=reg#nv/x:1",
        "--container-mounts=/shared/work:/shared/work,/shared/run:/shared/run,/a b:/c",
        "--container-workdir=/shared/work",
    ]
    assert ran.calls[0] == [
        *["srun", *container, "--ntasks-per-node=1", "--cpu-bind=none", "--nodes=1", "--ntasks=1"],
        *["megatron-spear", "launch", "begin", "/shared/run"],
    ]
    assert ran.of("node")[:4] == ["srun", *container]


@pytest.mark.parametrize("gpus", [0, 8])
def test_a_container_of_apptainer(cluster: Cluster, gpus: int) -> None:
    runtime = "{type: apptainer, image: /images/x y.sif, mounts: ['/data:/data']}"
    ran = cluster.run(_config(f"cluster.runtime={runtime}", f"cluster.gpus_per_node={gpus}"))
    mounts = ("/shared/work:/shared/work", "/shared/run:/shared/run", "/data:/data")
    binds = [word for mount in mounts for word in ("--bind", mount)]
    options = [*(["--nv"] if gpus else []), *binds, "--pwd", "/shared/work"]
    words = ["apptainer", "exec", *options, "/images/x y.sif", "megatron-spear", "launch"]
    assert ran.calls[0] == [*words, "begin", "/shared/run"]
    assert shlex.join([*words, "node"]) in shlex.join(ran.of("node"))


@pytest.mark.parametrize(
    ("mounts", "added"),
    [
        ("[/shared:/shared]", False),
        ("[/shared]", False),
        ("['/shared/work:/shared/work:ro']", False),
        ("[/disk:/shared/work]", False),
        ("[/disk:/shared]", True),
        ("[/shared:/data]", True),
        ("[/shared/workshop:/shared/workshop]", True),
    ],
)
def test_the_folder_of_the_launch_is_not_mounted_twice(mounts: str, added: bool) -> None:
    runtime = f"cluster.runtime={{type: pyxis, image: x, mounts: {mounts}}}"
    script = render(_config(runtime), Path("/shared/run"), FOLDER)
    assert ("/shared/work:/shared/work,/shared/run:/shared/run," in script) is added
    assert "--container-workdir=/shared/work " in script


def test_a_launch_in_the_run_directory_mounts_it_once() -> None:
    runtime = "cluster.runtime={type: pyxis, image: x}"
    assert "-mounts=/r:/r --container-workdir=/r " in render(
        _config(runtime), Path("/r"), Path("/r")
    )


def test_what_no_script_can_be_made_of() -> None:
    runtime = "cluster.runtime={type: apptainer, image: x.sif}"
    assert list(slurm_problems(_config(run="/a,b:c"), Path("/x:y"))) == []
    problems = list(slurm_problems(_config(runtime, run="/a,b:c"), Path("/x:y")))
    assert [problem.partition(": containers cannot mount a path")[0] for problem in problems] == [
        "run.dir=/a,b:c",
        "the folder of this launch, /x:y",
    ]
    (problem,) = slurm_problems(_config(runtime), Path("/"))
    assert problem.startswith("launched in /, which containers cannot mount")
    config = _config()
    two_lines = config.model_copy(update={"run": config.run.model_copy(update={"name": "a\nb"})})
    (problem,) = slurm_problems(two_lines, FOLDER)
    assert problem.startswith("run.name='a\\nb'")
