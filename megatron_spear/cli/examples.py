"""``megatron-spear examples``: which configurations come with the package, and copies of them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_spear.config.examples import FOLDER, copy_examples, list_examples
from megatron_spear.errors import ConfigError


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``examples``."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear examples",
        description="List the example configurations, or copy them to where they can be run and "
        "changed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "copy"),
        default="list",
        help="list (default), or copy all of them",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="where copy puts them (default: examples, as the documentation has it)",
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """List or copy; returns the exit status."""
    options = build_parser().parse_args(arguments)
    if options.action == "copy":
        folder = options.folder or Path(FOLDER)
        count = copy_examples(folder)
        print(f"{folder}: {count} new files")
        print(f"then: megatron-spear train {folder}/alfworld/quickstart.yaml")
        return 0
    if options.folder is not None:
        raise ConfigError(
            f"examples list: got the folder {options.folder}, expected none, for it lists what "
            f"comes along; `megatron-spear examples copy {options.folder}` copies it there"
        )
    found = list_examples()
    width = max(len(example.name) for example in found)
    for example in found:
        print(f"{example.name:{width}}  {example.summary}")
    print("`megatron-spear examples copy` puts them into the folder examples")
    return 0
