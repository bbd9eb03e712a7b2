"""How long saving a run's checkpoint holds the training up: waited for, and beside the training.

Rounds of training steps of one policy, in turn: without a save, with a checkpoint of
``checkpoint.async_save=false`` after the first step, and with one of ``true`` that is polled after
each step as in a run. Told are the seconds until the step with the save goes on, and what the
whole round took longer than one without a save (the writing takes cores from the training here);
then how long a raw write of the same bytes into one file takes, flushed to disk.

    python tools/benchmarks/checkpoint.py --threads 1 --rounds 5
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_spear.algorithms.policy_loss import NllLoss
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.policy import parallel
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.run_checkpoints import Progress, RunCheckpoints
from megatron_spear.trainer.run_directory import RunDirectory


def make_policy(folder: Path, hidden: int, layers: int) -> MegatronPolicy:
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
    }
    tiny_hf_folder(folder, **sizes)
    section = PolicySection()
    context = parallel.initialize(section, seed=0)
    return MegatronPolicy.from_hf(folder, section, OptimizerSection(lr=1e-5), 10_000, context)


def make_checkpoints(folder: Path, policy: MegatronPolicy, how: str) -> RunCheckpoints:
    cursor = SimpleNamespace(state_dict=dict)
    controller = SimpleNamespace(cursor=cursor, hooks=HookCalls({}), ahead=None)
    step: Any = SimpleNamespace(policy=policy, controller=controller)
    config = load_config(None, [f"checkpoint.async_save={how}", "checkpoint.keep=1"])
    return RunCheckpoints(config, step, RunDirectory(folder / how), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each kind")
    parser.add_argument("--steps", type=int, default=4, help="training steps a round")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = make_policy(folder / "hf", args.hidden, args.layers)
        packed = pack(*random_samples(24), tokens_per_microbatch=400)
        kinds = {"none": None} | {
            how: make_checkpoints(folder, policy, how) for how in ("false", "true")
        }
        policy.train_step(packed, NllLoss())
        held: dict[str, list[float]] = {kind: [] for kind in kinds}
        whole: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.rounds + 1):  # the first warms up
            for kind, checkpoints in kinds.items():
                times = play_round(policy, packed, checkpoints, args.steps)
                held[kind].append(times[0])
                whole[kind].append(times[1])
        size = sum(f.stat().st_size for f in (folder / "true").rglob("*") if f.is_file())
        raw = [raw_write(folder / "raw", size) for _ in range(args.rounds)]
    report(held, whole, size, args.steps)
    commit, written = statistics.median(held["false"][1:]), statistics.median(raw)
    print(f"{'commit, s':32}{commit:12.3f}{size / commit / 2**20:9.0f} MiB/s")
    print(f"{'raw write and fsync, s':32}{written:12.3f}{size / written / 2**20:9.0f} MiB/s")
    print(f"{'commit / raw write':32}{commit / written:12.2f}")


def raw_write(file: Path, size: int) -> float:
    """Seconds to write this many bytes and flush them; the file goes again."""
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        stream.write(block[: size % len(block)])
        stream.flush()
        os.fsync(stream.fileno())
    took = time.perf_counter() - started
    file.unlink()
    return took


def play_round(
    policy: MegatronPolicy, packed: Any, checkpoints: RunCheckpoints | None, steps: int
) -> tuple[float, float]:
    """Seconds (that the steps stood still for the save, that the steps took in all)."""
    started, waited = time.perf_counter(), 0.0
    for step in range(steps):
        policy.train_step(packed, NllLoss())
        before = time.perf_counter()
        if checkpoints is not None:
            checkpoints.poll()
            if step == 0:
                checkpoints.save(Progress(step=policy.num_steps))
        waited += time.perf_counter() - before
    took = time.perf_counter() - started
    if checkpoints is not None:
        checkpoints.finish()  # in most rounds it is committed already
    return waited, took


def report(
    held: dict[str, list[float]], whole: dict[str, list[float]], size: int, steps: int
) -> None:
    none, sync, beside = (statistics.median(whole[kind][1:]) for kind in ("none", "false", "true"))
    waited, begun = (statistics.median(held[kind][1:]) for kind in ("false", "true"))
    print(f"checkpoint of {size / 2**20:.0f} MiB, rounds of {steps} steps, {none:.2f} s each")
    print(f"{'':32}{'waited for':>12}{'beside':>12}{'ratio':>8}")
    print(f"{'training stands still, s':32}{waited:12.3f}{begun:12.3f}{begun / waited:8.2f}")
    longer = (sync - none, beside - none)
    print(f"{'the round takes longer by, s':32}{longer[0]:12.3f}{longer[1]:12.3f}", end="")
    print(f"{longer[1] / longer[0]:8.2f}")


if __name__ == "__main__":
    main()
