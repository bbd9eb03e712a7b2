"""``megatron-spear inspect``: replay stores, log-probs, differences of checkpoints, curves of runs.

Not called ``inspect``, as Python's own module would be hidden where this folder is on the path.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_spear.cli.settings import split_settings

DIFFERENT_EXIT = 1
"""Damage in a store, checkpoints that differ, log-probs further apart than is normal."""

_OPTIONS = ("--env", "--top")


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``inspect``; settings (``logprobs``) are not its business."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear inspect",
        description="Look into what runs leave behind; nothing is changed, and runs may go on.",
        epilog="docs/inspecting.md shows each with its output.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _replay_parser(kinds)
    _logprobs_parser(kinds)
    _diff_parser(kinds)
    _plot_parser(kinds)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Inspect; returns the exit status."""
    parser = build_parser()
    settings: list[str] = []
    if arguments and arguments[0] == "logprobs":
        words, settings = split_settings(arguments, _OPTIONS)
        options, unknown = parser.parse_known_args(words)
        settings += unknown
    else:
        options = parser.parse_args(arguments)
    return _RUN[options.kind](options, settings)


_Kinds = argparse._SubParsersAction


def _add(
    kinds: "_Kinds[argparse.ArgumentParser]", name: str, summary: str
) -> argparse.ArgumentParser:
    return kinds.add_parser(name, help=summary, description=summary, allow_abbrev=False)


def _replay_parser(kinds: "_Kinds[argparse.ArgumentParser]") -> None:
    sub = _add(kinds, "replay", "what a replay store holds, whether it is whole, and rows as text")
    add = sub.add_argument
    add("path", type=Path, metavar="PATH", help="run directory, its checkpoint, or replay folder")
    add("--checkpoint", type=int, metavar="STEP", help="the run's checkpoint (default: newest)")
    add("--row", type=int, action="append", default=[], metavar="ID", help="show this row's text")
    add("--best", type=_count, default=0, metavar="N", help="list the N rows of highest advantage")
    add("--model", type=Path, metavar="DIR", help="whose tokenizer to use (default: the run's)")
    add("--top", type=_count, default=5, metavar="N", help="prompts to list (default 5)")


def _logprobs_parser(kinds: "_Kinds[argparse.ArgumentParser]") -> None:
    sub = _add(
        kinds,
        "logprobs",
        "play some prompts and compare the engine's log-probs with the policy's, token by token; "
        "settings may follow, rollout.engine=sglang rollout.servers=[URL] say",
    )
    add = sub.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="Hugging Face folder, or a run directory with its exported model",
    )
    add("config", nargs="?", metavar="CONFIG", help="YAML file; over a run directory's own")
    add("--env", metavar="NAME", help="env.type; without any prompts of drawn tokens are used")
    add("-n", "--prompts", type=_count, default=8, metavar="N", help="prompts (default 8)")
    add("--top", type=_count, default=5, metavar="N", help="worst tokens to show (default 5)")


def _diff_parser(kinds: "_Kinds[argparse.ArgumentParser]") -> None:
    sub = _add(kinds, "diff", "by how much two checkpoints differ, tensor by tensor")
    for name in ("first", "second"):
        sub.add_argument(
            name,
            type=Path,
            metavar=name.upper(),
            help="Hugging Face folder, torch_dist folder, a run's checkpoint or a run directory",
        )
    sub.add_argument("--top", type=_count, default=10, metavar="N", help="tensors (default 10)")
    sub.add_argument(
        "--config", type=Path, metavar="DIR", help="the model's folder, where none has config.json"
    )


def _plot_parser(kinds: "_Kinds[argparse.ArgumentParser]") -> None:
    sub = _add(kinds, "plot", "draw metrics of one or several runs, a panel a metric")
    add = sub.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR")
    add("--metrics", default="", metavar="A,B", help="names or patterns such as 'replay/*'")
    add("--out", type=Path, default=Path("runs.png"), metavar="FILE", help=".png, .svg or .pdf")
    add("--smooth", type=_count, default=1, metavar="N", help="mean of the last N values")
    add("--data", type=Path, metavar="FILE", help="write the numbers as JSON too")
    add("--list", action="store_true", help="only list the metrics there are")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return value


def _run_replay(options: argparse.Namespace, settings: Sequence[str]) -> int:
    from megatron_spear.trainer.replay_of_run import read_store
    from megatron_spear.trainer.replay_report import best_rows, rows_in_words, store_in_words

    found = read_store(options.path, options.checkpoint)
    lines = (
        rows_in_words(found, options.row, options.model)
        if options.row
        else store_in_words(found, options.top)
    )
    if options.best:
        lines += best_rows(found, options.best)
    print(*lines, sep="\n")
    return DIFFERENT_EXIT if found.contents.faults else 0


def _run_logprobs(options: argparse.Namespace, settings: Sequence[str]) -> int:
    from megatron_spear.cli.main import before_torch
    from megatron_spear.config.load import load_config
    from megatron_spear.trainer.evaluated_model import find_model

    found = find_model(options.checkpoint)
    file = options.config or found.config
    keys = {setting.removeprefix("--").partition("=")[0] for setting in settings}
    plays = file is not None or options.env is not None or bool(keys & {"env", "env.type"})
    given = [f"evaluation.games={options.prompts}"]
    given += [f"env.type={options.env}"] if options.env is not None else []
    config = load_config(file, [*given, *settings])
    stop = before_torch(config.policy)
    from megatron_spear.trainer import jobs

    num_drawn = None if plays else options.prompts
    normal = jobs.compare_logprobs(config, found.folder, stop, num_drawn=num_drawn, top=options.top)
    return 0 if normal else DIFFERENT_EXIT


def _run_diff(options: argparse.Namespace, settings: Sequence[str]) -> int:
    from megatron_spear.conversion.differences import find_differences
    from megatron_spear.trainer.checkpoint_diff import diff_text, find_checkpoint

    first, second = find_checkpoint(options.first), find_checkpoint(options.second)
    found = find_differences(first.folder, second.folder, config=options.config)
    print(*diff_text(first, second, found, options.top), sep="\n")
    return 0 if found.equal else DIFFERENT_EXIT


def _run_plot(options: argparse.Namespace, settings: Sequence[str]) -> int:
    from megatron_spear.tracking import plot_runs

    runs = plot_runs.read_runs(options.runs)
    if options.list:
        print(*plot_runs.metric_names(runs), sep="\n")
        return 0
    patterns = [part for part in options.metrics.split(",") if part]
    metrics = plot_runs.choose_metrics(runs, patterns)
    plot_runs.plot_runs(runs, metrics, options.out, smooth=options.smooth)
    if options.data is not None:
        plot_runs.dump_series(runs, metrics, options.data)
    print(*plot_runs.table_of(runs, metrics), f"picture: {options.out}", sep="\n")
    return 0


_RUN: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "replay": _run_replay,
    "logprobs": _run_logprobs,
    "diff": _run_diff,
    "plot": _run_plot,
}
