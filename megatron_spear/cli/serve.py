"""``megatron-spear serve``: the embedded engine behind SGLang's HTTP contract."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

PORT_TAKEN_EXIT = 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of what comes after ``serve``."""
    parser = argparse.ArgumentParser(
        prog="megatron-spear serve",
        description="Serve a Hugging Face folder with the embedded engine, on the CPU, by SGLang's "
        "HTTP contract: /generate, pausing, weight updates.",
        epilog="Ctrl-C or SIGTERM stops it. docs/engines.md says where it is stricter than SGLang.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    add("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    add("--port", type=_port, default=30000, help="0 takes a free one (default %(default)s)")
    add(
        "--max-slots",
        type=_positive,
        default=32,
        metavar="N",
        help="generations at a time; others wait (default %(default)s)",
    )
    add(
        "--max-context",
        type=_positive,
        default=2048,
        metavar="N",
        help="tokens of a prompt and its answer (default %(default)s)",
    )
    add(
        "--deadline-s",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="for a generation, its waiting included (default %(default)g)",
    )
    add(
        "--update-deadline-s",
        type=_seconds,
        default=120.0,
        metavar="S",
        help="for each part of a weight update (default %(default)g)",
    )
    add(
        "--threads",
        type=_count,
        default=0,
        metavar="N",
        help="torch's threads; 0 = all cores (default %(default)s)",
    )
    add(
        "--quantization",
        choices=("fp8",),
        help="take weights as e4m3 with a scale per 128 x 128 only, as a quantised SGLang does",
    )
    add(
        "--custom-weight-loader",
        action="append",
        default=[],
        metavar="MODULE.FUNCTION",
        help="a load_format of update_weights_from_tensor, called with (model, named_tensors); "
        "may be given several times",
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Serve until a signal; returns the exit status."""
    options = build_parser().parse_args(arguments)
    from megatron_spear.serving.server import PortTaken, run
    from megatron_spear.serving.state import ServeSettings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = ServeSettings(
        model=options.model,
        host=options.host,
        port=options.port,
        max_slots=options.max_slots,
        max_context=options.max_context,
        deadline_s=options.deadline_s,
        update_deadline_s=options.update_deadline_s,
        threads=options.threads,
        quantization=options.quantization,
        custom_weight_loaders=tuple(options.custom_weight_loader),
    )
    try:
        run(settings, lambda url: print(f"{options.model} is served at {url}", flush=True))
    except PortTaken as error:
        print(f"error: {error}", file=sys.stderr)
        return PORT_TAKEN_EXIT
    return 0


def _count(text: str, least: int = 0) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"got {value}, expected {least} or more")
    return value


def _positive(text: str) -> int:
    return _count(text, 1)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected seconds above 0")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"got {value}, expected 0 to 65535")
    return value
