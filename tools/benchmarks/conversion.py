#!/usr/bin/env python3
"""Conversion of a synthetic checkpoint against copying its files, and its memory.

    python tools/benchmarks/conversion.py [--gigabytes 4] [--processes 1] [--folder DIR]

A Qwen3-shaped model in bfloat16 (vocabulary 151,936, width 2048) gets as many layers as the size
asks for. Each part runs in a process of its own: ``cp`` of the Hugging Face files, conversion to
Megatron at TP1 and TP4, back, and ``transformers``' way, which loads everything and saves it. All
flush what they wrote to disk. Times are medians over rounds; memory is the peak of anonymous pages,
without mapped files. Needs six times the size on disk.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from megatron_spear.conversion.convert import Layout, hf_to_megatron, megatron_to_hf
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.hf_io import shard_name, write_index
from megatron_spear.conversion.safetensors_out import write_safetensors
from megatron_spear.conversion.shape import load_config, model_shape
from megatron_spear.files import sync_file

SHARD = 10**9
GB = 10**9


def make(folder: Path, num_bytes: float) -> None:
    """A Hugging Face folder of about this size."""
    from transformers import Qwen3Config

    size = {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    layer = 2 * (2048 * (6144 * 3 + 4096 + 2048))
    layers = max(1, round((num_bytes - 4 * 151_936 * 2048) / layer))
    folder.mkdir(parents=True)
    config = Qwen3Config(**size, num_hidden_layers=layers, dtype="bfloat16")
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
    )
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    named = [
        (name, shape)
        for item in weight_table(model_shape(load_config(folder)))
        for name, shape in zip(item.sources, item.shapes, strict=True)
    ]
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in named:
        filled += 2 * torch.Size(shape).numel()
        if filled > SHARD and groups[-1]:
            groups.append([])
            filled = 2 * torch.Size(shape).numel()
        groups[-1].append((name, shape))
    for number, group in enumerate(groups, 1):
        with (folder / shard_name(number, len(groups))).open("wb") as file:
            tensors = (
                (
                    name,
                    noise.repeat(-(-torch.Size(s).numel() // len(noise)))[
                        : torch.Size(s).numel()
                    ].view(s),
                )
                for name, s in group
            )
            write_safetensors(file, {n: (s, torch.bfloat16) for n, s in group}, tensors)
    names = {n: shard_name(i, len(groups)) for i, group in enumerate(groups, 1) for n, _ in group}
    write_index(folder, names, 0)


def copy(source: Path, target: Path, processes: int) -> None:
    """What the others are measured against."""
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        os.spawnlp(os.P_WAIT, "cp", "cp", str(file), str(target))
        sync_file(target / file.name)


def there(source: Path, target: Path, processes: int) -> None:
    """To Megatron at TP1."""
    hf_to_megatron(source, target, Layout(), processes=processes)


def there_split(source: Path, target: Path, processes: int) -> None:
    """To Megatron at TP4."""
    hf_to_megatron(source, target, Layout(tensor=4), processes=processes)


def back(source: Path, target: Path, processes: int) -> None:
    """From Megatron, as ``there`` made it."""
    megatron_to_hf(source.with_name("there"), target, processes=processes)


def load_everything(source: Path, target: Path, processes: int) -> None:
    """transformers: the whole model in memory, then saved."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)
    for file in target.glob("*.safetensors"):
        sync_file(file)


PARTS: dict[str, tuple[str, Callable[[Path, Path, int], None]]] = {
    "copy": ("cp", copy),
    "there": ("hf-to-megatron, TP1", there),
    "split": ("hf-to-megatron, TP4", there_split),
    "back": ("megatron-to-hf", back),
    "transformers": ("transformers, load and save", load_everything),
}


def measured(part: str, source: Path, target: Path, processes: int) -> tuple[float, float]:
    """(seconds, GB of anonymous memory at the peak)."""
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        PARTS[part][1](source, target, processes)
        seconds = time.perf_counter() - started
    finally:
        done.set()
        watcher.join()
    return seconds, peak[0] / GB


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Make the checkpoint, run the parts, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3, help="parts take turns so often")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name) / "source"
        make(source, options.gigabytes * GB)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        found: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}
        for _ in range(options.rounds):
            for part in PARTS:
                found[part].append(_once(part, source, Path(name) / part, options.processes))
        print(f"{size / GB:.2f} GB in {len(list(source.glob('*.safetensors')))} files")
        print(f"{'':32}{'s':>8}{'GB/s':>8}{'of cp':>8}{'memory, GB':>12}")
        base = statistics.median(seconds for seconds, _ in found["copy"])
        for part, (what, _) in PARTS.items():
            seconds = statistics.median(one for one, _ in found[part])
            memory = max(one for _, one in found[part])
            ratio = f"{base / seconds:.2f}x"
            print(f"{what:32}{seconds:8.1f}{size / GB / seconds:8.2f}{ratio:>8}{memory:12.2f}")


def _once(part: str, source: Path, target: Path, processes: int) -> tuple[float, float]:
    """One part in a process of its own, with the source in memory and nothing else to write."""
    shutil.rmtree(target, ignore_errors=True)
    _warm(source)
    os.sync()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measured, part, source, target, processes).result()


def _warm(source: Path) -> None:
    """Read the files once, so that none is measured with a cold cache."""
    for file in source.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(2**24):
                pass


if __name__ == "__main__":
    main()
