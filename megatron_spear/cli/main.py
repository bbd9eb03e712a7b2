"""The ``megatron-spear`` command: parses arguments, calls the trainer, prints errors as one message."""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_spear.errors import SpearError, StopRequested

USAGE_EXIT = 2
STOPPED_EXIT = 130

_COMMANDS = {
    "train": "run the whole job: model, warm start, SPEAR steps, evaluation, export",
    "sft": "make the supervised warm start only",
    "evaluate": "play the evaluation panel with a Hugging Face folder",
    "check-config": "print the resolved configuration, or every mistake in it",
}


def build_parser() -> argparse.ArgumentParser:
    """The argument parser; settings after the file are ``a.b=c`` or ``--a.b c``."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear",
        description="SPEAR for agentic LLMs on Megatron-Core, from a CPU to a cluster.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("config", help="YAML file, e.g. examples/alfworld/quickstart.yaml")
        if name == "evaluate":
            sub.add_argument("--model", required=True, help="Hugging Face folder to evaluate")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Parse and run one command; returns the exit status."""
    options, settings = build_parser().parse_known_args(list(arguments))
    from megatron_spear.config.load import dump_config, load_config

    config = load_config(options.config, settings)
    if options.command == "check-config":
        print(dump_config(config), end="")
        return 0
    from megatron_spear.deadlines import install_stop_signals

    stop = install_stop_signals()  # before torch is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from megatron_spear.trainer import jobs

    if options.command == "train":
        jobs.train(config, stop)
    elif options.command == "sft":
        jobs.warm_start(config, stop)
    else:
        jobs.evaluate_model(config, options.model, stop)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point: no traceback for mistakes of the user."""
    try:
        status = run(sys.argv[1:] if arguments is None else arguments)
    except StopRequested as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        status = STOPPED_EXIT
    except SpearError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USAGE_EXIT
    except KeyboardInterrupt:
        print("stopped: interrupted a second time; the last checkpoint is whole", file=sys.stderr)
        status = STOPPED_EXIT
    sys.stdout.flush()
    sys.exit(status)


if __name__ == "__main__":
    main()
