"""``megatron-spear report``: one HTML file of what runs did, also while they go on."""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_spear.errors import ConfigError

if TYPE_CHECKING:
    from megatron_spear.report.write import ReportWriter

WATCH_S = 30.0
REPORT_NAME = "report.html"
_LEAST_S = 1.0


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``report``."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear report",
        description="Curves, trajectories and replay of a run in one HTML file that needs no "
        "server and no network; of several runs, means over seeds with 95 % bands.",
        epilog="Runs with equal settings but the seed form one arm. docs/report.md says how to "
        "read the page.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN_DIR", type=Path, help="run directory, a live one too")
    add(
        "--out",
        metavar="FILE",
        type=Path,
        help=f"default: {REPORT_NAME} in the run directory, of several runs here",
    )
    add(
        "--watch",
        nargs="?",
        type=_seconds,
        const=WATCH_S,
        metavar="SECONDS",
        help=f"write it anew so often (default {WATCH_S:.0f}) until all runs have ended or Ctrl-C; "
        "an open page follows",
    )
    add(
        "--group",
        action="append",
        default=[],
        metavar="NAME=DIR,DIR",
        help="these runs form the arm NAME, whatever their settings; may be given again",
    )
    add(
        "--max-mb",
        type=_megabytes,
        default=50.0,
        metavar="MB",
        help="limit of the file (default 50); above it the newest and best trajectories are kept",
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Write the report; returns the exit status."""
    options = build_parser().parse_args(arguments)
    groups = dict(_group(text) for text in options.group)
    runs = [*options.runs, *(path for paths in groups.values() for path in paths)]
    if not runs:
        raise ConfigError("report: no run directory given; expected report RUN_DIR [RUN_DIR..]")
    if len(groups) < len(options.group):
        raise ConfigError("--group: a name given twice; put all its runs behind one NAME=")
    from megatron_spear.files import make_folder_of
    from megatron_spear.report.write import ReportWriter

    out = options.out or (runs[0] / REPORT_NAME if len(runs) == 1 else Path(REPORT_NAME))
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; expected a file, report.html say")
    if options.out is not None:
        make_folder_of(out)
    writer = ReportWriter(
        options.runs,
        out,
        groups=groups,
        max_bytes=round(options.max_mb * 1e6),
        reload_s=options.watch or 0.0,
    )
    try:
        _write(writer, options.watch)
    except KeyboardInterrupt:
        if options.watch is None:
            raise
    return 0


def _write(writer: "ReportWriter", watch: float | None) -> None:
    """Write once, or with ``watch`` again and again until all runs have ended."""
    told: tuple[str, ...] = ()
    while True:
        written = writer.write()
        print(
            f"{written.path}: {written.num_bytes / 1e6:.1f} MB, "
            f"{written.num_trajectories:,} trajectories",
            flush=True,
        )
        for note in written.notes:
            if note not in told:
                print(f"  {note}")
        told = written.notes
        if watch is None or written.ended:
            return
        time.sleep(watch)


def _seconds(text: str) -> float:
    return _number(text, _LEAST_S, "seconds")


def _megabytes(text: str) -> float:
    return _number(text, 1.0, "MB")


def _number(text: str, least: float, unit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {least:.0f} {unit} or more")
    return value


def _group(text: str) -> tuple[str, list[Path]]:
    name, _, paths = text.partition("=")
    folders = [Path(path) for path in paths.split(",") if path]
    if not name or not folders:
        raise ConfigError(f"--group {text}: expected NAME=DIR or NAME=DIR,DIR")
    return name, folders
