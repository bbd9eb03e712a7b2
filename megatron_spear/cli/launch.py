"""``megatron-spear launch``: a job with all it needs, on this machine or on a cluster."""

import argparse
from collections.abc import Sequence

from megatron_spear.cli import launch_local, launch_preflight, launch_slurm
from megatron_spear.cli.settings import split_settings

_WITH_SETTINGS = ("local", "slurm")


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``launch``; settings are not its business."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear launch",
        description="Run a job with its trainer ranks, engine servers and environment workers.",
        epilog="After the file come further ones that go over it, and settings, a.b=c or --a.b c.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="WHERE")
    launch_local.add_commands(commands)
    launch_slurm.add_commands(commands)
    launch_preflight.add_commands(commands)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Parse and run one way of launching; returns the exit status."""
    parser = build_parser()
    if arguments and arguments[0] in _WITH_SETTINGS:
        words, settings = split_settings(arguments)
        options, unknown = parser.parse_known_args(words)
        settings += unknown
    else:
        options, settings = parser.parse_args(arguments), []
    status: int = options.run(options, settings)
    return status
