"""``megatron-spear launch preflight``: the checks of all nodes before a run starts on them."""

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PREFLIGHT = "check the nodes of an attempt; the job script calls it on each of them"


def add_commands(commands: Any) -> None:
    """Add the parser of ``preflight``; it sets ``run`` to what takes the options and the settings
    and gives the exit status."""
    parser = commands.add_parser(
        "preflight",
        help=_PREFLIGHT,
        description="Check the nodes of an attempt. Exit status: 0 all are good, 3 some are bad "
        "(RUN/bad_nodes names them), 2 the settings are wrong.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--attempt", type=Path, required=True, metavar="DIR", help="the attempt's folder")
    add(
        "--node-index",
        type=int,
        default=int(os.environ.get("SLURM_NODEID", "0")),
        metavar="N",
        help="number of this node in the job (default: SLURM_NODEID, else 0)",
    )
    add(
        "--node-name",
        default=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        metavar="NAME",
        help="its name (default: SLURMD_NODENAME, else this machine's)",
    )
    add(
        "--num-nodes",
        type=int,
        default=int(os.environ.get("SLURM_NNODES", "1")),
        metavar="N",
        help="nodes of the job (default: SLURM_NNODES, else 1)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """This node's part; returns the exit status."""
    from megatron_spear.cluster.attempt import Attempt
    from megatron_spear.cluster.keepers import Node
    from megatron_spear.cluster.preflight.judge import expand_names
    from megatron_spear.cluster.preflight.node import Facts
    from megatron_spear.cluster.preflight.run import Preflight
    from megatron_spear.config.load import CONFIG_NAME, load_config
    from megatron_spear.deadlines import Watchdog
    from megatron_spear.errors import ConfigError

    attempt = Attempt(options.attempt.resolve())
    cluster = load_config(attempt.run / CONFIG_NAME).cluster
    if settings:
        raise ConfigError(f"launch preflight takes no settings, got {' '.join(settings)}")
    if options.num_nodes != cluster.num_nodes:
        raise ConfigError(
            f"the job has {options.num_nodes} node(s), and cluster.trainer_nodes + "
            f"cluster.engine_nodes is {cluster.num_nodes}"
        )
    if not 0 <= options.node_index < cluster.num_nodes:
        raise ConfigError(
            f"--node-index {options.node_index}: expected a number from 0 to "
            f"{cluster.num_nodes - 1}"
        )
    if not cluster.preflight.enabled:
        print("preflight: cluster.preflight.enabled is false, so nothing is checked")
        return 0
    address = cluster.network.address or options.node_name
    preflight = Preflight(
        cluster=cluster,
        attempt=attempt,
        node=Node(index=options.node_index, name=options.node_name, address=address),
        names=expand_names(os.environ.get("SLURM_JOB_NODELIST", "")),
        say=lambda text: print(text, flush=True),
        facts=Facts(),
    )
    with Watchdog(preflight.limit_s + 30.0, f"the preflight of {options.node_name}"):
        return preflight.run()
