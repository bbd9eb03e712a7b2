"""``megatron-spear launch slurm``, and ``begin`` and ``end`` of an attempt for its job script."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_spear.cli.launch_common import CONFIG_HELP, launchable, make_run_directory

_SLURM = "submit a job that runs it on a Slurm cluster, again after stops and crashes"
_BEGIN = "number the next attempt of a run; the job script calls it"
_END = "say whether a run goes on after an attempt; the job script calls it"
_SBATCH_S = 120.0


def add_commands(commands: Any) -> None:
    """Add the parsers of ``slurm``, ``begin`` and ``end``; each sets ``run`` to what takes the
    options and the settings (``a.b=c``) and gives the exit status."""
    slurm = commands.add_parser("slurm", help=_SLURM, description=_SLURM, allow_abbrev=False)
    slurm.add_argument("config", nargs="?", help=CONFIG_HELP)
    slurm.add_argument(
        "--dry-run",
        action="store_true",
        help="print the job script and the resolved settings, and change nothing",
    )
    slurm.set_defaults(run=run_slurm)
    begin = commands.add_parser("begin", help=_BEGIN, description=_BEGIN, allow_abbrev=False)
    begin.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    begin.set_defaults(run=run_begin)
    end = commands.add_parser("end", help=_END, description=_END, allow_abbrev=False)
    end.add_argument("--attempt", type=Path, required=True, metavar="DIR", help="its folder")
    end.add_argument(
        "--status", type=int, required=True, metavar="N", help="exit status of the job step"
    )
    end.set_defaults(run=run_end)


def run_slurm(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Prepare the run directory and submit the job, or show what would be submitted."""
    from megatron_spear.cluster.restarts import grant_restarts
    from megatron_spear.cluster.slurm import SCRIPT_NAME, render
    from megatron_spear.config.load import dump_config
    from megatron_spear.files import write_whole

    config = launchable(options.config, settings)
    run = (config.resume or config.run.dir).resolve()
    script = render(config, run)
    if options.dry_run:
        print(script)
        print(f"# --- {run / 'config.yaml'}\n{dump_config(config)}", end="")
        return 0
    make_run_directory(config)
    grant_restarts(run)
    write_whole(run / SCRIPT_NAME, script)
    print(_submit(run / SCRIPT_NAME))
    print(f"the job's log: {run}/job-*.log; the run: {run}")
    return 0


def run_begin(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Print the folder of the next attempt; what there is to say goes to stderr. 1 = none is begun,
    since the one before was the last."""
    from megatron_spear.cluster.attempt import Attempt
    from megatron_spear.cluster.restarts import Verdict, judge_lost
    from megatron_spear.config.load import CONFIG_NAME, load_config

    run = _run_directory(options.run_dir)
    lost = judge_lost(run, load_config(run / CONFIG_NAME).cluster)
    if lost is not None:
        print(f"the attempt before: {lost.verdict}: {lost.reason}", file=sys.stderr)
        if lost.verdict is Verdict.FAILED:
            return 1
    print(Attempt.begin(run).path)
    return 0


def run_end(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Print what becomes of the run; 0 = it is done, ``AGAIN_EXIT`` = it goes on, 1 = given up."""
    from megatron_spear.cluster.attempt import Attempt
    from megatron_spear.cluster.restarts import Verdict, judge
    from megatron_spear.cluster.slurm import AGAIN_EXIT
    from megatron_spear.config.load import CONFIG_NAME, load_config

    attempt = Attempt(options.attempt.resolve())
    cluster = load_config(_run_directory(attempt.run) / CONFIG_NAME).cluster
    judgement = judge(attempt, options.status, cluster)
    print(f"attempt {attempt.number}: {judgement.verdict}: {judgement.reason}")
    return {Verdict.DONE: 0, Verdict.AGAIN: AGAIN_EXIT, Verdict.FAILED: 1}[judgement.verdict]


def _run_directory(path: Path) -> Path:
    from megatron_spear.config.load import CONFIG_NAME
    from megatron_spear.errors import ConfigError

    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(f"{path} has no {CONFIG_NAME}, so it is no run directory")
    return path.resolve()


def _submit(script: Path) -> str:
    """What sbatch says; ConfigError with its complaint where it refuses."""
    from megatron_spear.errors import ConfigError

    try:
        done = subprocess.run(
            ["sbatch", str(script)], capture_output=True, text=True, timeout=_SBATCH_S, check=False
        )
    except FileNotFoundError:
        raise ConfigError(
            f"sbatch is not on this machine; submit {script} from a login node of the cluster, or "
            "use `megatron-spear launch local`"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"sbatch did not answer within {_SBATCH_S:g} s; is slurmctld up?"
        ) from None
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip()
