"""Packing: how full micro-batches are, how even the ranks, and what padding would cost instead.

    python tools/benchmarks/packing.py [--threads 2] [--rounds 5] [--only plan|step]

- plan: 2,048 trajectories of log-normal length (sigma 1, capped at 16,384 tokens, mean 3,000) over
  16 data-parallel ranks, micro-batches of 16,384 tokens; the worst of ``--seeds`` draws. Planning
  is deciding what goes where; no tensors are made. It runs on one thread, and its CPU time says
  what it takes where others use the machine.
- step: training steps of a tiny Qwen3 on the CPU on lengths like those of the quickstart's
  demonstrations (log-normal, sigma 0.27, mean 140); the same policy, weights and loss on packed
  rows and on rows padded to the longest of their micro-batch, in turns.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_spear.algorithms.policy_loss import NllLoss
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.balance import plan_micro_batches, token_cost
from megatron_spear.data.packing import PackedStep, pack
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import Origin, TrainSample

Row = tuple[str, str, str]
"""What was measured, its aim, and what was seen."""

RANKS, LIMIT, CAP, MEAN = 16, 16_384, 16_384, 3_000
STEP_LIMIT, VOCAB = 4096, 1024


def lognormal_lengths(count: int, mean: float, sigma: float, cap: int, seed: int) -> list[int]:
    """Lengths of 1 to ``cap`` whose mean is ``mean`` after capping."""
    draw = np.random.default_rng(seed).lognormal(0.0, sigma, count)
    for _ in range(50):
        draw *= mean / np.minimum(draw, cap).mean()
    return [int(length) for length in np.clip(draw.round(), 1, cap)]


def plan_rows(options: argparse.Namespace) -> list[Row]:
    draws = [lognormal_lengths(2048, MEAN, 1.0, CAP, seed) for seed in range(options.seeds)]
    most = min(sum(x) / (RANKS * LIMIT * -(-sum(x) // (RANKS * LIMIT))) for x in draws)
    found = []
    for mix, name in ((True, "lengths mixed"), (False, "runs of like length (on a CPU)")):
        full, spread, wall, cpu = zip(
            *(_planned(x, mix, options.rounds) for x in draws), strict=True
        )
        aims = ("0.97", "1.03", "50 ms") if mix else ("", "", "")
        seen = (
            f"{min(full):.3f}" + (f" (at most {most:.3f})" if mix else ""),
            f"{max(spread):.4f}",
            f"{1e3 * max(wall):.1f} ms ({1e3 * max(cpu):.1f} ms of CPU time)",
        )
        what = ("real tokens / slots", "cost of ranks, max / mean", "planning, median")
        found += [(f"{name}: {w}", a, s) for w, a, s in zip(what, aims, seen, strict=True)]
    return found


def _planned(lengths: list[int], mix: bool, rounds: int) -> tuple[float, float, float, float]:
    """(real tokens over slots, cost of the dearest rank over the mean, median seconds of wall and
    of CPU time)."""
    wall, cpu = [], []
    for _ in range(rounds):
        start, used = time.perf_counter(), time.process_time()
        plan = plan_micro_batches(
            lengths, data_parallel=RANKS, tokens_per_microbatch=LIMIT, mix_lengths=mix
        )
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    slots = LIMIT * sum(len(rank) for rank in plan)
    costs = [sum(token_cost(lengths[i]) for group in rank for i in group) for rank in plan]
    spread = max(costs) / statistics.fmean(costs)
    return sum(lengths) / slots, spread, statistics.median(wall), statistics.median(cpu)


def step_rows(options: argparse.Namespace) -> list[Row]:
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy
    from megatron_spear.testing.tiny import tiny_hf_folder

    lengths = lognormal_lengths(48, 140, 0.27, 512, 0)
    samples, weights = _samples(lengths)
    steps = {"packed": _packed(samples, weights), "padded": _packed(*_padded(samples, weights))}
    section = PolicySection(tokens_per_microbatch=STEP_LIMIT)
    ctx = parallel.initialize(section, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        size: dict[str, Any] = {
            "hidden_size": 128,
            "intermediate_size": 576,
            "num_hidden_layers": 3,
        }
        tiny_hf_folder(Path(folder), vocab_size=VOCAB, **size)
        policies = {
            name: MegatronPolicy.from_hf(Path(folder), section, OptimizerSection(), 1000, ctx)
            for name in steps
        }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        losses = []
        for name, policy in policies.items():
            start = time.perf_counter()
            losses.append(policy.train_step(steps[name], NllLoss())["loss/total"])
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
        assert math.isclose(losses[0], losses[1], rel_tol=1e-4), (
            f"padding changed the loss: {losses}"
        )
    parallel.destroy()
    return _step_table(seconds, sum(lengths), steps["padded"].num_tokens)


def _step_table(seconds: Mapping[str, list[float]], real: int, slots: int) -> list[Row]:
    ratio = statistics.median(
        b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True)
    )
    packed, padded = (1e3 * statistics.median(seconds[name]) for name in ("packed", "padded"))
    return [
        ("tiny Qwen3, padded rows: real tokens / positions", "", f"{real / slots:.3f}"),
        ("step on packed rows, against padded ones", "", f"{packed:.0f} ms, {padded:.0f} ms"),
        ("- padded / packed, median of rounds", "", f"{ratio:.2f}x"),
    ]


def _samples(lengths: list[int]) -> tuple[list[TrainSample], list[np.ndarray]]:
    draw = np.random.default_rng(0)
    samples = [
        make_sample(str(i), mask=[1] * n, token_ids=draw.integers(0, VOCAB, n).astype(np.int32))
        for i, n in enumerate(lengths)
    ]
    weights = [np.full(n, 1.0 / sum(lengths), np.float32) for n in lengths]
    for weight in weights:
        weight[0] = 0.0
    return samples, weights


def _packed(samples: list[TrainSample], weights: list[np.ndarray]) -> PackedStep:
    return pack(
        samples, weights, [Origin.ON_POLICY] * len(samples), tokens_per_microbatch=STEP_LIMIT
    )


def _padded(
    samples: list[TrainSample], weights: list[np.ndarray]
) -> tuple[list[TrainSample], list[np.ndarray]]:
    """Rows as they come, as many as fit padded, each with token 0 up to the longest of them."""
    groups: list[list[int]] = [[]]
    longest = 0
    for index, sample in enumerate(samples):
        longest = max(longest, len(sample.token_ids))
        if longest * (len(groups[-1]) + 1) > STEP_LIMIT:
            groups.append([])
            longest = len(sample.token_ids)
        groups[-1].append(index)
    rows, row_weights = [], []
    for group in groups:
        length = max(len(samples[i].token_ids) for i in group)
        for i in group:
            added = (0, length - len(samples[i].token_ids))
            ids = np.pad(samples[i].token_ids, added)
            rows.append(make_sample(str(i), mask=[1] * length, token_ids=ids))
            row_weights.append(np.pad(weights[i], added))
    return rows, row_weights


PARTS: Mapping[str, Callable[[argparse.Namespace], list[Row]]] = {
    "plan": plan_rows,
    "step": step_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5, help="draws of lengths to plan for")
    parser.add_argument("--only", choices=sorted(PARTS), help="only this part")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| what | aim | seen |\n|---|---|---|")
    for name in [options.only] if options.only else PARTS:
        for row in PARTS[name](options):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
