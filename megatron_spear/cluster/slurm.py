"""The job script of a run on Slurm, from its settings.

    #SBATCH header        nodes, time, signal before its end, requeue, one job of a name at a time
    variables             network, caches
    launch begin          numbers the attempt
    srun launch node      one supervisor a node, trainer nodes first
    launch end            says whether the run is done, goes on (scontrol requeue) or has failed

Slurm tells the script of the coming end by SIGUSR1, of preemption and ``scancel`` by SIGTERM. Each
is handed on as SIGUSR1, upon which the run saves and stops. A cancelled job is not requeued.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_spear.cluster.commands import network_environment
from megatron_spear.config.cluster import ApptainerRuntime, ClusterSection, PyxisRuntime
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import ConfigError

SCRIPT_NAME = "job.sbatch"
AGAIN_EXIT = 10
"""Exit status of ``launch end`` for a run that goes on."""

_BODY = """
# 1. The attempt. What is decided, is decided in Python: megatron_spear/cluster/restarts.py.
attempt=$({one_node} launch begin "$RUN") || {{ echo "job: no attempt was begun" >&2; exit 2; }}
echo "job $SLURM_JOB_ID, restart ${{SLURM_RESTART_COUNT:-0}}: $attempt on $SLURM_JOB_NODELIST"

# 2. One supervisor a node. Signals reach them as SIGUSR1: save, stop, end well.
step=
tell() {{ if [ -n "$step" ]; then kill -USR1 "$step" 2>/dev/null; fi; }}
trap tell USR1 TERM INT
{all_nodes} launch node --attempt "$attempt" &
step=$!
status=1
# A signal ends `wait` before the step has ended.
while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done

# 3. On or not. slurmctld ends this shell when it requeues the job, so nothing may catch that now.
trap - USR1 TERM INT
{one_node} launch end --attempt "$attempt" --status "$status"
verdict=$?
if [ "$verdict" -eq {again} ]; then
    case "$(scontrol show job -o "$SLURM_JOB_ID")" in
    *JobState=RUNNING*) scontrol requeue "$SLURM_JOB_ID" && sleep 60 ;;
    *) echo "job: cancelled, so it is not started again" ;;
    esac
    exit 0
fi
exit "$verdict"
"""


def render(config: RunConfig, run: Path) -> str:
    """The script for ``sbatch``; ``run`` is the absolute run directory, which all nodes see.

    Raises ConfigError where the path cannot stand in a script's header.
    """
    if "%" in str(run) or "\n" in str(run) or '"' in str(run):
        raise ConfigError(
            f"run.dir={run}: Slurm reads % and quotes in the names of its log files; choose another"
        )
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _header(config, run)),
        "# Made by `megatron-spear launch slurm`; docs/cluster.md explains it.",
        "set -uo pipefail",
        f"RUN={shlex.quote(str(run))}",
        *(f"export {name}={value}" for name, value in _environment(config)),
    ]
    body = _BODY.format(
        one_node=_command(config.cluster, run, everywhere=False),
        all_nodes=_command(config.cluster, run, everywhere=True),
        again=AGAIN_EXIT,
    )
    return "\n".join(lines) + "\n" + body


def _header(config: RunConfig, run: Path) -> Iterator[str]:
    cluster, slurm = config.cluster, config.cluster.slurm
    yield f"--job-name={_quoted(config.run.name)}"
    yield f"--nodes={cluster.num_nodes}"
    yield "--ntasks-per-node=1"
    yield "--exclusive"
    yield "--mem=0"
    if cluster.gpus_per_node:
        yield f"--gpus-per-node={cluster.gpus_per_node}"
    yield f"--time={slurm.time_limit}"
    yield f"--signal=B:USR1@{slurm.signal_before_s}"
    yield "--requeue"
    yield "--open-mode=append"
    yield "--dependency=singleton"
    yield f"--output={_quoted(f'{run}/job-%j.log')}"
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    yield from (f"--{name}={_quoted(value)}" for name, value in named.items() if value)
    if slurm.exclude:
        yield f"--exclude={_quoted(','.join(slurm.exclude))}"
    yield from slurm.options


def _quoted(value: str) -> str:
    """A value in a header, whose quotes are double ones."""
    return value if shlex.quote(value) == value else '"' + value.replace('"', "'") + '"'


def _environment(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Variables of all processes, values as they stand in the script."""
    policy = config.policy
    if config.cluster.gpus_per_node and (policy.tensor_parallel > 1 or policy.context_parallel > 1):
        # Kernels then start in the order that overlapping them with messages needs.
        yield "CUDA_DEVICE_MAX_CONNECTIONS", "1"
    # Kernels are compiled on each node: a shared file system would serve them slowly, or wrongly.
    yield "TRITON_CACHE_DIR", '"/tmp/triton-${USER:-$(id -u)}-$SLURM_JOB_ID"'
    for name, value in network_environment(config.cluster.network).items():
        yield name, shlex.quote(value)


def _command(cluster: ClusterSection, run: Path, *, everywhere: bool) -> str:
    """What comes before ``launch ...``: on every node of the job, or on one."""
    runtime = cluster.runtime
    srun = ["srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", "--label"]
    if isinstance(runtime, PyxisRuntime):
        mounts = ",".join((f"{run}:{run}", *runtime.mounts))
        container = [f"--container-image={runtime.image}", f"--container-mounts={mounts}"]
        first = srun if everywhere else ["srun", "--nodes=1", "--ntasks=1"]
        return _shell([*first, *container, "megatron-spear"])
    if isinstance(runtime, ApptainerRuntime):
        binds = [word for mount in (f"{run}:{run}", *runtime.mounts) for word in ("--bind", mount)]
        gpus = ["--nv"] if cluster.gpus_per_node else []
        inside = ["apptainer", "exec", *gpus, *binds, str(runtime.image), "megatron-spear"]
    else:
        python = runtime.path / "bin" / "python" if runtime.path else Path(sys.executable)
        inside = [str(python), "-m", "megatron_spear.cli.main"]
    return _shell([*srun, *inside] if everywhere else inside)


def _shell(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
