"""``megatron-spear plan``: what a run needs and how long a step takes, before it is started."""

import argparse
import json
from collections.abc import Sequence

from megatron_spear.cli.settings import split_settings
from megatron_spear.errors import ConfigError

REFUSED_EXIT = 1
GPUS_PER_NODE = {"gb200": 4}
"""Of chips whose nodes have other than 8."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``plan``; settings are not its business."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear plan",
        description="Memory by part, step time by phase, resharding and better layouts of a run on "
        "the machines of cluster.*; nothing is started. Exit status 1 if it cannot fit.",
        epilog="After the file come further ones that go over it, and settings, a.b=c or --a.b c. "
        "Without a file: the defaults, with these settings. docs/planner.md says what it assumes.",
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", help="YAML file")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a published model by name (llama-3.1-70b) or a folder with config.json, in place of "
        "model.path; no weights are needed",
    )
    parser.add_argument(
        "--gpus",
        type=_positive,
        metavar="N",
        help="GPUs in all, in whole nodes; those that cluster.engine_nodes does not take train",
    )
    parser.add_argument("--chip", metavar="NAME", help="cluster.chip, h100 say")
    parser.add_argument(
        "--mean-length",
        type=_positive,
        metavar="TOKENS",
        help="mean tokens of a context (default: half of rollout.max_context)",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Print the plan; 0 if the run fits, 1 if not."""
    words, settings = split_settings(arguments)
    options, unknown = build_parser().parse_known_args(words)
    from megatron_spear.cluster.planner.plan import make_plan
    from megatron_spear.cluster.planner.report import text_of, values_of
    from megatron_spear.config.load import load_config

    given = [*settings, *unknown]
    if options.chip:
        given.append(f"cluster.chip={options.chip}")
    config = load_config(options.config, given)
    if options.gpus:
        cluster = config.cluster
        given += _nodes(options.gpus, cluster.chip, cluster.gpus_per_node, cluster.engine_nodes)
        config = load_config(options.config, given)
    plan = make_plan(config, named=options.model, mean_length=options.mean_length)
    print(json.dumps(values_of(plan), indent=2) if options.json else text_of(plan), end="")
    if options.json:
        print()
    return 0 if plan.fits else REFUSED_EXIT


def _nodes(gpus: int, chip: str, gpus_per_node: int, engine_nodes: int) -> list[str]:
    """The settings that stand for so many GPUs in all."""
    each = min(gpus_per_node or GPUS_PER_NODE.get(chip, 8), gpus)
    trainer_nodes = gpus // each - engine_nodes
    if gpus % each or trainer_nodes < 1:
        raise ConfigError(
            f"--gpus {gpus} are no whole nodes of {each} with cluster.engine_nodes={engine_nodes} "
            f"and one that trains; use a multiple of {each}, at least {(engine_nodes + 1) * each}"
        )
    return [f"cluster.gpus_per_node={each}", f"cluster.trainer_nodes={trainer_nodes}"]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return value
