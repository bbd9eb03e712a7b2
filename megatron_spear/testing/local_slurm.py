"""A real Slurm on this machine for tests: its daemons on loopback, some nodes, gone afterwards.

    with LocalSlurm(nodes=2) as slurm:
        job = slurm.submit(script)
        slurm.wait_for(job, "COMPLETED", within_s=60)

Needs Debian's packages slurmctld, slurmd, slurm-client and munge, no systemd, no cgroups, no root.
Each node is a slurmd with a port of its own; node names resolve to nothing, so jobs need
``cluster.network.address=127.0.0.1``. Partition ``urgent`` preempts ``main`` by requeueing.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_spear.cluster.processes import end_with_parent

_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "sinfo")
_START_S, _STOP_S, _CALL_S = 30.0, 10.0, 30.0

_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=600
SwitchType=switch/none
"""
_PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed; [] = all is there."""
    return [name for name in _PROGRAMS if _path(name) is None]


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class LocalSlurm:
    """A cluster of ``nodes`` (n1, n2, ...); ``grace_s`` passes between the SIGTERM of a preemption
    and its SIGKILL."""

    def __init__(self, nodes: int = 2, *, grace_s: int = 20) -> None:
        self.nodes = nodes
        self._grace_s = grace_s
        # Under /tmp, since the path of a socket may have 107 characters.
        self.home = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "LocalSlurm":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which commands speak to this cluster."""
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.home / "slurm.conf")}

    def call(self, *command: str, check: bool = True) -> str:
        """What a command (``scontrol``, say) prints. Raises RuntimeError if it fails."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_CALL_S,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: Path, *options: str) -> int:
        """The number of a new job."""
        return int(self.call("sbatch", "--parsable", *options, str(script)).strip())

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job: ``JobState``, ``Restarts``, ``NodeList``, ``Reason``, ..."""
        text = self.call("scontrol", "show", "job", "-o", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_for(self, number: int, state: str, *, within_s: float) -> Any:
        """The ``job`` once it is in this state. Raises TimeoutError with what it was in."""
        return self.wait_until(
            lambda: (job := self.job(number))["JobState"] == state and job, within_s, f"job {state}"
        )

    def wait_until(self, condition: Callable[[], Any], within_s: float, what: str) -> Any:
        """What the condition gives once it is true. Raises TimeoutError naming the jobs."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{what}: not within {within_s:g} s; jobs: {self.call('squeue', '-a')}")

    def start_again(self, number: int, *, restart: int = 1, within_s: float = 60.0) -> None:
        """Let a job that is or will be requeued for the ``restart``-th time begin; Slurm would hold
        it back for two minutes. Raises TimeoutError."""

        def is_requeued() -> bool:
            job = self.job(number)
            waits = job["JobState"] == "PENDING" and int(job["Restarts"]) >= restart
            return waits and not list(self.home.glob(f"spool.*/n[0-9]*_{number}.*"))  # no step

        self.wait_until(is_requeued, within_s, f"job {number} is requeued")
        # A node refuses a job in the second in which it ended it.
        self.call("scontrol", "update", f"jobid={number}", "StartTime=now+2")
        self.wait_until(
            lambda: self.job(number)["JobState"] != "PENDING",
            within_s,
            f"job {number} begins again",
        )

    def clear(self) -> None:
        """End all jobs and wait until the nodes are idle."""
        self.call("scancel", f"--user={getpass.getuser()}", check=False)
        self.wait_until(self._all_idle, _START_S, "all nodes are idle")

    def lose_node(self, name: str) -> None:
        """Let Slurm take a node for lost, with the job on it."""
        self.call("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def bring_back(self, name: str, *, within_s: float = 30.0) -> None:
        """Let Slurm use a lost node again."""

        def is_back() -> bool:
            self.call("scontrol", "update", f"nodename={name}", "state=resume", check=False)
            state = self.call("sinfo", "-h", "-n", name, "-p", "main", "-o", "%t").strip()
            return state in ("idle", "alloc")

        self.wait_until(is_back, within_s, f"node {name} is back")

    def close(self) -> None:
        """End all jobs and daemons and remove the folder."""
        with contextlib.suppress(RuntimeError, OSError, subprocess.TimeoutExpired):
            self.call("scancel", "--full", f"--user={getpass.getuser()}", check=False)
            self.call("scancel", "--signal=KILL", f"--user={getpass.getuser()}", check=False)
            end = time.monotonic() + _STOP_S
            while self.call("squeue", "-h").strip() and time.monotonic() < end:
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            _end(daemon)
        shutil.rmtree(self.home, ignore_errors=True)

    def _start(self) -> None:
        for folder in ("munge", "state"):
            (self.home / folder).mkdir()
        self.home.chmod(0o755)
        (self.home / "munge").chmod(0o711)
        key = self.home / "munge" / "key"
        key.touch(mode=0o400)
        key.chmod(0o600)
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._configure()
        munge = self.home / "munge"
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
        )
        self.wait_until_ready((munge / "socket").exists)
        conf = str(self.home / "slurm.conf")
        self._daemon("slurmctld", "-D", "-c", "-f", conf)
        for name in self._names():
            self._daemon("slurmd", "-D", "-N", name, "-f", conf)
        self.wait_until_ready(self._all_idle)

    def _configure(self) -> None:
        ports = _free_ports(1 + self.nodes)
        host = socket.gethostname().partition(".")[0]
        lines = _CONF.format(host=host, ports=ports, user=getpass.getuser(), home=self.home)
        for name, port in zip(self._names(), ports[1:], strict=True):
            lines += (
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 "
                "RealMemory=4000 State=UNKNOWN\n"
            )
        lines += _PARTITIONS.format(grace_s=self._grace_s)
        (self.home / "slurm.conf").write_text(lines)
        (self.home / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def _names(self) -> Sequence[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def _daemon(self, name: str, *arguments: str) -> None:
        program = _path(name)
        assert program, f"{name} is installed"
        own = os.getpid()
        with (self.home / f"{name}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=lambda: end_with_parent(signal.SIGTERM, own),
                )
            )

    def wait_until_ready(self, ready: Callable[[], bool]) -> None:
        """Wait for a part of the cluster; RuntimeError with the daemons' last words."""
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if any(daemon.poll() is not None for daemon in self._daemons):
                break
            if ready():
                return
            time.sleep(0.1)
        logs = [*self.home.glob("*.out"), *self.home.glob("*.log"), self.home / "munge" / "log"]
        told = "\n".join(f"{p.name}: {p.read_text()[-500:]}" for p in logs if p.is_file())
        raise RuntimeError(f"the local Slurm did not start:\n{told}")

    def _all_idle(self) -> bool:
        idle = self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False)
        return len(idle.split()) == self.nodes


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, then SIGKILL to its session."""
    daemon.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.wait(_STOP_S)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(daemon.pid, signal.SIGKILL)
    daemon.wait()
