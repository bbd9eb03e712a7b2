"""The job script of a run on Slurm, from its settings.

    #SBATCH header          nodes, time, signal before its end, requeue, one job of a run at a time
    variables               network, caches
    launch begin            numbers the attempt
    srun launch preflight   asks every node; the next attempt is without those found bad
    srun launch node        one supervisor a node, trainer nodes first
    launch end              says whether the run is done, goes on (scontrol requeue) or has failed

Slurm tells the script of the coming end by SIGUSR1, of preemption and ``scancel`` by SIGTERM. Each
is handed on as SIGUSR1, upon which the run saves and stops. A cancelled job is not requeued.
"""

import hashlib
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_spear.cluster.attempt import bad_nodes
from megatron_spear.cluster.commands import network_environment
from megatron_spear.config.cluster import ApptainerRuntime, ClusterSection, PyxisRuntime
from megatron_spear.config.schema import RunConfig

SCRIPT_NAME = "job.sbatch"
AGAIN_EXIT = 10
"""Exit status of ``launch end`` for a run that goes on."""

_BODY = r"""
# Signals reach a step as SIGUSR1: save, stop, end well.
step= told= phase=preflight status=0
tell() { told=$1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null; }
for name in USR1 TERM INT; do trap "tell $name" "$name"; done

# The attempt. What is decided, is decided in Python: megatron_spear/cluster/restarts.py.
attempt=$(trap '' USR1 TERM INT; "${here[@]}" launch begin "$RUN") || exit 1
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $attempt on $SLURM_JOB_NODELIST"

on_all_nodes() { # preflight or node, options of srun
    phase=$1
    shift
    "${srun[@]}" --label "$@" "${spear[@]}" launch "$phase" --attempt "$attempt" &
    step=$!
    # A signal ends `wait` before the step has ended.
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step"
    status=$?
    step=
}
@PREFLIGHT@
if [ -z "$told" ] && [ "$status" -eq 0 ]; then
    on_all_nodes node --kill-on-bad-exit=1 --wait=0
fi

# On or not. slurmctld sends SIGTERM to a job that it requeues, too.
trap '' USR1 TERM INT
"${here[@]}" launch end --attempt "$attempt" --phase "$phase" --status "$status" --told "$told"
verdict=$?
[ "$verdict" -eq @AGAIN@ ] || exit "$verdict"
# Not if it is cancelled; nor if this node was lost to Slurm, which has begun the job elsewhere.
case $(scontrol show job -o "$SLURM_JOB_ID") in
*" JobState=RUNNING "*" Restarts=${SLURM_RESTART_COUNT:-0} "*) ;;
*) echo "job: Slurm is ending it, so it is not requeued from here"; exit 0 ;;
esac
if ! scontrol requeue "$SLURM_JOB_ID"; then
    echo "job: it cannot be requeued; to go on: sbatch $(printf %q "$RUN/@SCRIPT@")" >&2
    exit 1
fi
if [ -s "$attempt/exclude" ]; then
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(cat "$attempt/exclude")"
fi
"""


def slurm_problems(config: RunConfig, folder: Path) -> Iterator[str]:
    """One line for each setting with which there is no job script, or no job that gets on;
    ``folder`` is the one of the launch, as in ``render``."""
    for name, value in (("run.name", config.run.name), ("run.dir", str(config.run.dir))):
        if "\n" in value:
            yield f"{name}={value!r} has several lines, and the header of a job script has one"
    if config.cluster.runtime.type == "venv":
        return
    for name, path in (("run.dir=", config.run.dir), ("the folder of this launch, ", folder)):
        if set(str(path)) & set(":,"):
            yield f"{name}{path}: containers cannot mount a path with : or , in it"
    if folder == Path("/"):
        yield "launched in /, which containers cannot mount; launch it in another folder"


def excluded(cluster: ClusterSection, run: Path) -> str:
    """All nodes that a run's jobs leave out, as Slurm writes them; empty if there is none."""
    return ",".join(dict.fromkeys([*cluster.slurm.exclude, *bad_nodes(run)]))


def render(config: RunConfig, run: Path, folder: Path) -> str:
    """The script for ``sbatch``; ``run`` is the absolute run directory, ``folder`` the absolute one
    at which relative paths start. All nodes see both."""
    cluster = config.cluster
    container, spear = _runtime(cluster, run, folder)
    # A task starts processes for all cores of its node, so it is bound to none.
    srun = ["srun", *container, "--ntasks-per-node=1", "--cpu-bind=none"]
    here = '"${srun[@]}" --nodes=1 --ntasks=1 ' if container else ""
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _header(config, run)),
        "# Made by `megatron-spear launch slurm`; docs/cluster.md explains it.",
        "set -uo pipefail",
        f"RUN={shlex.quote(str(run))}",
        *(f"export {name}={value}" for name, value in _environment(config)),
        f"srun=({shlex.join(srun)})",
        f"spear=({shlex.join(spear)})",
        f'here=({here}"${{spear[@]}}") # on one node',
    ]
    parts = {
        "@PREFLIGHT@": _preflight(cluster),
        "@AGAIN@": str(AGAIN_EXIT),
        "@SCRIPT@": SCRIPT_NAME,
    }
    body = re.sub("@[A-Z_]+@", lambda match: parts[match[0]], _BODY)
    return "\n".join(lines) + "\n" + body


def job_name(config: RunConfig, run: Path) -> str:
    """The run's name, and six digits of its directory, so that no other run waits for its jobs."""
    return f"{config.run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:6]}"


def _header(config: RunConfig, run: Path) -> Iterator[str]:
    cluster, slurm = config.cluster, config.cluster.slurm
    yield f"--job-name={_quoted(job_name(config, run))}"
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
    log = str(run / "job-").replace("%", "%%") + "%j.log"
    yield f"--output={_quoted(log)}"
    named = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "exclude": excluded(cluster, run),
    }
    yield from (f"--{name}={_quoted(value)}" for name, value in named.items() if value)
    yield from slurm.options


def _quoted(value: str) -> str:
    """A value in a header: as it is, or in double quotes."""
    if re.fullmatch(r"[\w%+,./:=@-]+", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _environment(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Variables of all processes, values as they stand in the script."""
    # Kernels are compiled on each node: a shared file system would serve them slowly, or wrongly.
    yield "TRITON_CACHE_DIR", '"/tmp/triton-$(id -u)"'
    for name, value in network_environment(config.cluster.network).items():
        yield name, shlex.quote(value)


def _preflight(cluster: ClusterSection) -> str:
    """The call of the preflight; empty if there is none.

    A node that is found bad ends no other's. One that hangs is waited for as long as the preflight
    may last, once the others have ended.
    """
    if not cluster.preflight.enabled:
        return ""
    wait_s = math.ceil(cluster.preflight.deadline_s)
    return f"on_all_nodes preflight --kill-on-bad-exit=0 --wait={wait_s}"


def _runtime(cluster: ClusterSection, run: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Options of ``srun`` for a container, if it makes one; the words before ``launch ...``.

    A container starts in a folder of its image, so that relative paths need to be told theirs.
    """
    runtime = cluster.runtime
    if isinstance(runtime, PyxisRuntime):
        container = [
            f"--container-image={runtime.image}",
            f"--container-mounts={','.join(_mounts(run, folder, runtime.mounts))}",
            f"--container-workdir={folder}",
        ]
        return container, ["megatron-spear"]
    if isinstance(runtime, ApptainerRuntime):
        mounts = _mounts(run, folder, runtime.mounts)
        options = ["--nv"] if cluster.gpus_per_node else []
        options += [word for mount in mounts for word in ("--bind", mount)]
        options += ["--pwd", str(folder)]
        return [], ["apptainer", "exec", *options, str(runtime.image), "megatron-spear"]
    python = runtime.path / "bin" / "python" if runtime.path else Path(sys.executable)
    return [], [str(python), "-m", "megatron_spear.cli.main"]


def _mounts(run: Path, folder: Path, given: Sequence[str]) -> list[str]:
    """All mounts of a container. The folder of the launch comes first, since the run directory may
    be inside; it is left out where the user's own mounts have it."""
    own = [] if any(_has(mount, folder) for mount in given) else [f"{folder}:{folder}"]
    return list(dict.fromkeys([*own, f"{run}:{run}", *given]))


def _has(mount: str, folder: Path) -> bool:
    """Whether a mount (``SOURCE:TARGET``, ``PATH``) puts something at ``folder``: it is the target,
    or inside one that has the same path outside."""
    source, _, rest = mount.partition(":")
    target = rest.partition(":")[0] or source
    return str(folder) == target or (source == target and folder.is_relative_to(target))
