"""``megatron-spear launch local`` and ``launch node``: a run on this machine, one node of a run."""

import argparse
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_spear.cli.launch_common import CONFIG_HELP, launchable, make_run_directory

_LOCAL = "run a job with its servers and workers on this machine, again after crashes"
_NODE = "one node of a launched job; the job script calls it on each"


def add_commands(commands: Any) -> None:
    """Add the parsers of ``local`` and ``node``; each sets ``run`` to what takes the options and
    the settings (``a.b=c``) and gives the exit status."""
    local = commands.add_parser("local", help=_LOCAL, description=_LOCAL, allow_abbrev=False)
    local.add_argument("config", nargs="?", help=CONFIG_HELP)
    local.set_defaults(run=run_local)
    node = commands.add_parser("node", help=_NODE, description=_NODE, allow_abbrev=False)
    node.add_argument(
        "--attempt", type=Path, required=True, metavar="DIR", help="the attempt's folder"
    )
    node.add_argument(
        "--node-index",
        type=int,
        default=int(os.environ.get("SLURM_NODEID", "0")),
        metavar="N",
        help="number of this node in the job (default: SLURM_NODEID, else 0)",
    )
    node.add_argument(
        "--node-name",
        default=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        metavar="NAME",
        help="its name (default: SLURMD_NODENAME, else this machine's)",
    )
    node.set_defaults(run=run_node)


def run_local(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Prepare the run directory and run attempts; returns the exit status."""
    from megatron_spear.cluster import stop

    signals = stop.install()
    from megatron_spear.cluster.local import one_machine_problems, run_attempts

    config = launchable(options.config, settings, one_machine_problems)
    run = make_run_directory(config)
    return run_attempts(config, run, stop=signals, say=_teller("launch"))


def run_node(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Supervise one node of an attempt; returns its exit status."""
    import asyncio

    from megatron_spear.cluster import stop

    signals = stop.install()
    from megatron_spear.cluster.attempt import Attempt
    from megatron_spear.cluster.keepers import Node
    from megatron_spear.cluster.supervisor import Supervisor
    from megatron_spear.config.load import CONFIG_NAME, load_config
    from megatron_spear.errors import ConfigError

    attempt = Attempt(options.attempt.resolve())
    config = load_config(attempt.run / CONFIG_NAME)
    if not 0 <= options.node_index < config.cluster.num_nodes:
        raise ConfigError(
            f"--node-index {options.node_index}: the run has {config.cluster.num_nodes} node(s), "
            "expected a number from 0 below that"
        )
    address = config.cluster.network.address or options.node_name
    node = Node(index=options.node_index, name=options.node_name, address=address)
    supervisor = Supervisor(config, attempt, node, stop=signals, say=_teller(options.node_name))
    return asyncio.run(supervisor.run())


def _teller(who: str) -> Any:
    """Prints lines with the time and who says them."""

    def say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {who}: {line}", flush=True)

    return say
