"""``megatron-spear launch``: a job with all it needs, on this machine or on a cluster."""

import argparse
from collections.abc import Sequence

from megatron_spear.cli import launch_local, launch_slurm
from megatron_spear.cli.main import joined, split_settings


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``launch``; settings are not its business."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear launch",
        description="Run a job with its trainer ranks, engine servers and environment workers.",
        epilog="After the file come settings, a.b=c or --a.b c.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="WHERE")
    launch_local.add_commands(commands)
    launch_slurm.add_commands(commands)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Parse and run one way of launching; returns the exit status."""
    words, settings = split_settings(joined(arguments))
    options, unknown = build_parser().parse_known_args(words)
    status: int = options.run(options, [*settings, *unknown])
    return status
