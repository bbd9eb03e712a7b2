"""``megatron-spear convert``: checkpoints between Hugging Face and Megatron, compared too."""

import argparse
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_spear.errors import StopRequested

DIFFERENT_EXIT = 1
_POLL_S = 0.5


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``convert``."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear convert",
        description="Checkpoints between Hugging Face folders and Megatron-Core (torch_dist).",
        epilog="A conversion that was stopped goes on when the same command is given again.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    there = _add(kinds, "hf-to-megatron", "make a torch_dist checkpoint of a Hugging Face folder")
    for name in ("tensor", "pipeline", "expert"):
        there.add_argument(
            f"--{name}-parallel",
            type=_positive,
            default=1,
            metavar="N",
            help="cut files as this layout reads them best; every layout can (default 1)",
        )
    there.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="convert all tensors")
    back = _add(kinds, "megatron-to-hf", "make a Hugging Face folder of a torch_dist checkpoint")
    back.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "fp8-block"),
        help="convert all tensors; fp8-block: linear layers in e4m3 with a scale per 128 x 128",
    )
    for sub in (there, back):
        sub.add_argument(
            "--processes", type=_positive, default=1, metavar="N", help="files written at a time"
        )
    both = _add(kinds, "verify", "compare two checkpoints tensor by tensor", ("A", "B"))
    for sub in (back, both):
        sub.add_argument(
            "--config",
            type=Path,
            help="the model's Hugging Face folder, where none has config.json",
        )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run one conversion or comparison; returns the exit status."""
    options = build_parser().parse_args(arguments)
    first, second = options.first, options.second
    if options.kind == "verify":
        return _verify(first, second, options.config)
    from megatron_spear.conversion import convert

    with _progress(first, second), _stop_told():
        if options.kind == "hf-to-megatron":
            layout = convert.Layout(
                tensor=options.tensor_parallel,
                pipeline=options.pipeline_parallel,
                expert=options.expert_parallel,
            )
            convert.hf_to_megatron(
                first, second, layout, dtype=options.dtype, processes=options.processes
            )
        else:
            convert.megatron_to_hf(
                first,
                second,
                config=options.config,
                dtype=options.dtype,
                processes=options.processes,
            )
    print(f"{second}: {_size(second) / 1e9:.2f} GB")
    return 0


def _verify(first: Path, second: Path, config: Path | None) -> int:
    from megatron_spear.conversion.verify import compare

    found = compare(first, second, config=config)
    for line in found.differences:
        print(line)
    same = found.num_tensors - len(found.differences)
    how = f", {found.num_rounded} after rounding to the coarser dtype" if found.num_rounded else ""
    how += f", {found.num_quantized} within FP8 rounding" if found.num_quantized else ""
    print(f"verify: {same} of {found.num_tensors} tensors equal{how}")
    return DIFFERENT_EXIT if found.differences else 0


def _add(
    kinds: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    paths: tuple[str, str] = ("SRC", "DST"),
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    for place, metavar in zip(("first", "second"), paths, strict=True):
        parser.add_argument(place, type=Path, metavar=metavar)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return value


@contextmanager
def _stop_told() -> Iterator[None]:
    """Ctrl-C loses nothing here."""
    try:
        yield
    except KeyboardInterrupt:
        raise StopRequested("the same command goes on with what is not finished yet") from None


@contextmanager
def _progress(source: Path, target: Path) -> Iterator[None]:
    """On a terminal a bar with bytes a second and the time left; it watches the growing folder."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from megatron_spear.conversion.shards import work_folder

    work, done = work_folder(target), threading.Event()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar as progress:
        task = progress.add_task("convert", total=_size(source) or None, completed=_size(work))

        def watch() -> None:
            while not done.wait(_POLL_S):
                progress.update(task, completed=_size(work))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _size(folder: Path) -> int:
    """Bytes of the files of weights in a folder; 0 while it is not there."""
    try:
        files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".distcp")]
        return sum(file.stat().st_size for file in files)
    except OSError:  # the folder is just being put in place
        return 0
