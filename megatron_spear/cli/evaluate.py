"""``megatron-spear evaluate``: how well a model does on a panel, with intervals and transcripts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_spear.cli.settings import split_settings
from megatron_spear.errors import ConfigError

_OPTIONS = ("--env", "--panel", "--attempts", "--temperature", "--top-p", "--out")
_SETTING_OF = {
    "env": "env.type",
    "attempts": "evaluation.attempts",
    "temperature": "evaluation.temperature",
    "top_p": "evaluation.top_p",
}
"""The setting that each of these options stands for."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``evaluate``; settings are not its business."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear evaluate",
        description="Play every game of a panel n times: mean@n, pass@k, success by kind and 95 % "
        "intervals as a table and in evaluation.json, all attempts in trajectories.jsonl.",
        epilog="After these come settings, a.b=c or --a.b c (env.max_turns=50, "
        "rollout.max_new_tokens=512). docs/evaluation.md says what the numbers mean.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="Hugging Face folder, or a run directory: its exported model with its settings",
    )
    add("config", nargs="?", metavar="CONFIG", help="YAML file; over a run directory's own")
    add("--env", metavar="NAME", help="env.type, alfworld say")
    add(
        "--panel",
        metavar="PATH",
        help="file or folder of games, all of it, or the name of a split of env.games",
    )
    add("-n", "--attempts", metavar="N", help="attempts a game (evaluation.attempts)")
    add("--temperature", metavar="T", help="evaluation.temperature; 0 = greedy")
    add("--top-p", metavar="P", help="evaluation.top_p")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder of the results, new or empty (default: evaluation in the run directory, "
        "MODEL-evaluation beside a model; with -2, -3, .. where there is one)",
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Evaluate; returns the exit status."""
    words, settings = split_settings(arguments, _OPTIONS)
    options, unknown = build_parser().parse_known_args(words)
    settings += unknown
    from megatron_spear.config.load import load_config
    from megatron_spear.trainer.evaluated_model import find_model

    found = find_model(options.checkpoint)
    file = options.config or found.config
    keys = {setting.removeprefix("--").partition("=")[0] for setting in settings}
    if file is None and options.env is None and not keys & {"env", "env.type"}:
        raise ConfigError(
            f"{options.checkpoint} is a model alone, and nothing says what to play; give a YAML "
            "file after it, or --env NAME (alfworld, say), with settings as needed"
        )
    given = [
        f"{setting}={getattr(options, name)}"
        for name, setting in _SETTING_OF.items()
        if getattr(options, name) is not None
    ]
    if options.panel is not None:
        given.append("evaluation.games=null")  # all of it, unless a setting says how many
    config = load_config(file, [*given, *settings])
    if options.panel is not None:
        env = config.env.with_panel(options.panel)
        config = config.model_copy(update={"env": env})
    from megatron_spear.cli.main import before_torch

    stop = before_torch()
    from megatron_spear.trainer import jobs

    jobs.evaluate_model(config, found, stop, options.out)
    return 0
