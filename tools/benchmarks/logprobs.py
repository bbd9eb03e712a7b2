#!/usr/bin/env python3
"""Log-probs and entropy over a large vocabulary, forward and backward, against torch's plain way.

    python tools/benchmarks/logprobs.py [--tokens 4096] [--vocab 151936] [--rounds 3]

Plain: ``log_softmax``, ``gather`` and entropy, each over the whole ``[T, V]``. Each side runs in
processes of its own, in turns; memory is the peak of the process beyond what it held with the
logits made. At the default size the plain side needs about 13 GB.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from megatron_spear.algorithms.logprobs import token_logprobs


def ours(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logprobs, entropy = token_logprobs(logits, labels, with_entropy=True)
    assert entropy is not None
    return logprobs.sum()


def plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    table = logits.log_softmax(-1)
    with torch.no_grad():
        (table.exp() * table).sum(-1)
    return table.gather(1, labels[:, None]).sum()


SIDES = {"ours": ours, "plain": plain}


def measured(side: str, tokens: int, vocab: int, threads: int) -> tuple[float, float, float]:
    """(seconds, GiB beyond the logits, sum of the log-probs) of one forward and backward."""
    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=draw).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=draw)
    few = torch.randn(8, vocab, generator=draw).requires_grad_()
    SIDES[side](few, labels[:8]).backward()  # loads what is loaded once
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    total = SIDES[side](logits, labels)
    total.backward()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (peak - held) / 2**20, total.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = (options.tokens, options.vocab, options.threads)
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found[side].append(pool.submit(measured, side, *sizes).result())
    (seconds, memory, total), (other_s, other_gib, other_total) = (
        [statistics.median(values) for values in zip(*runs, strict=True)] for runs in found.values()
    )
    assert abs(total - other_total) <= 1e-5 * abs(other_total), "both sides compute the same"
    print(f"{options.tokens} tokens, {options.vocab} words, {options.threads} thread(s)")
    print(f"{'':24}{'ours':>10}{'plain':>10}{'ratio':>8}  aim")
    print(f"{'time, s':24}{seconds:10.2f}{other_s:10.2f}{seconds / other_s:7.2f}x  0.8x")
    print(f"{'memory beyond logits, GiB':24}{memory:9.2f}{other_gib:10.2f}", end="")
    print(f"{memory / other_gib:7.3f}x 0.35x")


if __name__ == "__main__":
    main()
