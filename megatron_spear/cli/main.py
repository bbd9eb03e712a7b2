"""The ``megatron-spear`` command: parses arguments, calls the trainer, prints errors as one
message."""

import argparse
import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_spear.cli.settings import split_settings
from megatron_spear.errors import PeerLost, SpearError, StopRequested

if TYPE_CHECKING:
    from megatron_spear.cluster.attempt import Attempt
    from megatron_spear.config.schema import PolicySection
    from megatron_spear.deadlines import StopFlag

USAGE_EXIT = 2
STOPPED_EXIT = 130
PEER_GONE_EXIT = 71
UNREAD_EXIT = 128 + signal.SIGPIPE

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

_COMMANDS = {
    "train": "run the whole job: model, warm start, SPEAR steps, evaluation, export",
    "sft": "make the supervised warm start only",
    "check-config": "print the resolved configuration, or every mistake in it",
}
_WITH_PARSERS = {
    "evaluate": "play a panel with a model: mean@n, pass@k, intervals, and every trajectory",
    "convert": "make a Megatron checkpoint of a Hugging Face folder, or back, or compare two",
    "examples": "list the example configurations that come along, or copy them",
    "inspect": "look into a replay store, log-probs, checkpoints, and curves of runs",
    "launch": "run a job with its ranks, servers and workers, on this machine or a cluster",
    "plan": "memory, step time and better layouts of a run, before it is started",
    "report": "curves, trajectories and replay of runs in one HTML file; several runs compared",
    "serve": "serve a Hugging Face folder with the embedded engine by SGLang's HTTP contract",
}
"""Commands in modules of their own, which parse what comes after the name."""

_MODULES = {"inspect": "inspection"}
"""Those whose module has another name."""


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; settings (``a.b=c`` or ``--a.b=c``) are not its business."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear",
        description="SPEAR for agentic LLMs on Megatron-Core, from a CPU to a cluster.",
        epilog="After the file come further ones that go over it, and settings, a.b=c or --a.b c. "
        "`train --resume DIR` without a file continues a run with the settings it began with.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-spear {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument(
            "config",
            nargs="?",
            help="YAML file, e.g. examples/alfworld/quickstart.yaml; none with --resume DIR",
        )
        if name == "train":
            sub.add_argument("--attempt", type=Path, help=argparse.SUPPRESS)  # what launch passes
    for name, summary in _WITH_PARSERS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _version() -> str:
    try:
        return metadata.version("megatron-spear")
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        return "(not installed)"


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command; returns the exit status."""
    if arguments and arguments[0] in _WITH_PARSERS:
        name = _MODULES.get(arguments[0], arguments[0])
        command = importlib.import_module(f"megatron_spear.cli.{name}")
        return int(command.run(arguments[1:]))
    parser = build_parser()
    words, settings = split_settings(arguments)
    options, unknown = parser.parse_known_args(words)
    settings += unknown
    keys = {setting.removeprefix("--").partition("=")[0] for setting in settings}
    if options.config is None and "resume" not in keys:
        parser.error(f"{options.command}: no YAML file, and no --resume DIR that would have one")
    from megatron_spear.config.load import dump_config, load_config

    config = load_config(options.config, settings)
    if options.command == "check-config":
        from megatron_spear.cluster.roles import require_settings
        from megatron_spear.trainer.own_code import own_code

        require_settings(config)
        own_code(config, environment_too=True)
        print(dump_config(config), end="")
        return 0
    stop = before_torch(config.policy)
    from megatron_spear.trainer import jobs

    if options.command == "train":
        jobs.train(config, stop, _attempt(options.attempt))
    else:
        jobs.warm_start(config, stop)
    return 0


def before_torch(policy: "PolicySection | None" = None) -> "StopFlag":
    """What a command that computes sets up before torch is imported; its stop signals. ``policy``
    is that of a rank that trains; what the user has set in the environment stays."""
    from megatron_spear.deadlines import install_stop_signals

    stop = install_stop_signals()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for each other give their core away: far better where the machine is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if policy is not None and (policy.tensor_parallel > 1 or policy.context_parallel > 1):
        # Kernels then start in the order that overlapping them with messages needs.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return stop


def _attempt(folder: Path | None) -> "Attempt | None":
    """The attempt that this rank is of; it then ends with torchrun, however that ends."""
    if folder is None:
        return None
    from megatron_spear.cluster.attempt import Attempt
    from megatron_spear.cluster.processes import end_with_parent

    end_with_parent()
    return Attempt(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point: no traceback for mistakes of the user."""
    try:
        status = run(sys.argv[1:] if arguments is None else arguments)
    except StopRequested as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        status = STOPPED_EXIT
    except PeerLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        status = PEER_GONE_EXIT
    except SpearError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USAGE_EXIT
    except KeyboardInterrupt:
        print(
            "stopped at once; what came after the last checkpoint is lost. Continue a run that "
            "has one with resume=DIR, else give the same command again",
            file=sys.stderr,
        )
        status = STOPPED_EXIT
    except OSError as error:
        message = _machine_says(error)
        if message is None and not _output_is_unread():
            raise
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
        status = USAGE_EXIT
    if _output_is_unread():
        print("stopped: nobody reads the output any more", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit complains
        status = UNREAD_EXIT
    _hear_no_more()
    sys.exit(status)


def _output_is_unread() -> bool:
    """Whether what is printed goes to a pipe that nobody reads any more, as after ``| head``."""
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
        ends = select.poll()
        ends.register(sys.stdout, 0)
        return any(event & select.POLLERR for _, event in ends.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError):  # no file of the system's, or one that is closed
        return False


def _hear_no_more() -> None:
    """A process that ends is not to be ended by one more request to stop: while the interpreter
    goes down, its handlers are gone and a signal would be its exit status."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _machine_says(error: OSError) -> str | None:
    """What a full disk or a forbidden path means for the user; None for any other fault."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _NO_SPACE:
        return (
            f"{where}the disk is full or a quota is reached ({error.strerror}); free some space "
            "and continue with resume=DIR of the run (checkpoints are untouched)"
        )
    if error.errno in _NO_ACCESS:
        return f"{where}cannot be used ({error.strerror}); give a path that this user may write"
    return None


if __name__ == "__main__":
    main()
