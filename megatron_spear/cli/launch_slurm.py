"""``megatron-spear launch slurm``, and ``begin`` and ``end`` of an attempt for its job script."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spear.cli.launch_common import CONFIG_HELP, launchable, make_run_directory

if TYPE_CHECKING:
    from megatron_spear.config.cluster import ClusterSection
    from megatron_spear.config.schema import RunConfig

_SLURM = "submit a job that runs it on a Slurm cluster, again after stops and crashes"
_BEGIN = "number the next attempt of a run; the job script calls it"
_END = "say whether a run goes on after an attempt; the job script calls it"


def add_commands(commands: Any) -> None:
    """Add the parsers of ``slurm``, ``begin`` and ``end``; each sets ``run`` to what takes the
    options and the settings (``a.b=c``) and gives the exit status."""
    slurm = commands.add_parser("slurm", help=_SLURM, description=_SLURM, allow_abbrev=False)
    slurm.add_argument("config", nargs="?", help=CONFIG_HELP)
    slurm.add_argument(
        "--dry-run",
        action="store_true",
        help="print the job script, the resolved settings and the plan, and change nothing",
    )
    slurm.add_argument(
        "--force",
        action="store_true",
        help="submit what the planner says cannot fit the GPUs' memory",
    )
    slurm.set_defaults(run=run_slurm)
    begin = commands.add_parser("begin", help=_BEGIN, description=_BEGIN, allow_abbrev=False)
    begin.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    begin.set_defaults(run=run_begin)
    end = commands.add_parser("end", help=_END, description=_END, allow_abbrev=False)
    end.add_argument("--attempt", type=Path, required=True, metavar="DIR", help="its folder")
    end.add_argument(
        "--phase",
        choices=("preflight", "node"),
        default="node",
        help="the last job step (default %(default)s)",
    )
    end.add_argument(
        "--status", type=int, required=True, metavar="N", help="exit status of that step"
    )
    end.add_argument(
        "--told", default="", metavar="SIGNAL", help="the last signal that the job was sent"
    )
    end.set_defaults(run=run_end)


def run_slurm(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Prepare the run directory and submit the job, or show what would be submitted."""
    from megatron_spear.cluster.planner.refusal import require_fits
    from megatron_spear.cluster.restarts import grant_restarts
    from megatron_spear.cluster.signal_time import signal_warning
    from megatron_spear.cluster.slurm import SCRIPT_NAME, render, slurm_problems
    from megatron_spear.cluster.submission import refuse_second_job, submit
    from megatron_spear.config.load import dump_config
    from megatron_spear.files import write_whole

    folder = Path.cwd()
    config = launchable(options.config, settings, partial(slurm_problems, folder=folder))
    run = config.run.dir.resolve()
    script = render(config, run, folder)
    if warning := signal_warning(config):
        print(f"warning: {warning}", file=sys.stderr)
    if options.dry_run:
        print(script)
        print(f"# --- {run / 'config.yaml'}\n{dump_config(config)}", end="")
        print("# --- the plan (megatron-spear plan)")
        print(textwrap.indent(_plan(config), "# ", lambda line: True), end="")
        return 0
    if not options.force:
        require_fits(config)
    refuse_second_job(run)
    make_run_directory(config)
    grant_restarts(run)
    write_whole(run / SCRIPT_NAME, script)
    job = submit(run)
    print(f"job {job} is submitted; its log: {run}/job-{job}.log; to stop it: scancel {job}")
    return 0


def _plan(config: "RunConfig") -> str:
    """The plan, or why there is none: the model may lie where only the nodes see it."""
    from megatron_spear.cluster.planner.report import plan_text
    from megatron_spear.errors import SpearError

    try:
        return plan_text(config)
    except SpearError as error:
        return f"no plan: {error}\n"


def run_begin(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Print the folder of the next attempt; what there is to say goes to stderr. 1 = none is begun,
    since the one before was the last."""
    from megatron_spear.cluster.attempt import Attempt
    from megatron_spear.cluster.restarts import Verdict, judge_lost

    run, cluster = _run_and_cluster(options.run_dir)
    lost = judge_lost(run, cluster)
    if lost is not None:
        print(f"the attempt before: {lost.verdict}: {lost.reason}", file=sys.stderr)
        if lost.verdict is Verdict.FAILED:
            return 1
    print(Attempt.begin(run).path)
    return 0


def run_end(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Print what becomes of the run; 0 = it is done, ``AGAIN_EXIT`` = it goes on, 1 = given up."""
    from megatron_spear.cluster.attempt import Attempt, newest_checkpoint
    from megatron_spear.cluster.restarts import BAD_NODES_STATUS, USAGE_STATUS, Verdict, judge
    from megatron_spear.cluster.slurm import AGAIN_EXIT, excluded
    from megatron_spear.files import write_whole

    attempt, status = Attempt(options.attempt.resolve()), options.status
    run, cluster = _run_and_cluster(attempt.run)
    if options.phase == "preflight" and options.told:
        attempt.mark_stopped(f"{options.told} before it began", newest_checkpoint(run))
    elif options.phase == "preflight" and status != USAGE_STATUS and attempt.new_bad_nodes():
        write_whole(attempt.exclude_file, excluded(cluster, run))
        status = BAD_NODES_STATUS  # a node that hung was killed, with another one
    judgement = judge(attempt, status, cluster, options.told)
    print(f"attempt {attempt.number}: {judgement.verdict}: {judgement.reason}")
    return {Verdict.DONE: 0, Verdict.AGAIN: AGAIN_EXIT, Verdict.FAILED: 1}[judgement.verdict]


def _run_and_cluster(path: Path) -> "tuple[Path, ClusterSection]":
    """The absolute run directory and the settings of its machines."""
    from megatron_spear.config.load import CONFIG_NAME, load_config
    from megatron_spear.errors import ConfigError

    if not (path / CONFIG_NAME).is_file():
        raise ConfigError(f"{path} has no {CONFIG_NAME}, so it is no run directory")
    return path.resolve(), load_config(path / CONFIG_NAME).cluster
