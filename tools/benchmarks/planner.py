#!/usr/bin/env python3
"""Time of the planner for 70B on 1,024 GPUs, of the simulator, and predictions against figures.

python tools/benchmarks/planner.py [--figures]

The aim is a ranking of all layouts under 2 s on one core. ``--figures`` prints the published
figures with what is predicted, as docs/planner-times.md shows them.
"""

import argparse
import time
from dataclasses import replace

from megatron_spear.cluster.planner.efficiency import CONSTANTS
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.published import FIGURES, LLAMA_70B
from megatron_spear.cluster.planner.search import best_layouts, best_splits
from megatron_spear.cluster.planner.simulator import simulate
from megatron_spear.cluster.planner.step import step_of
from megatron_spear.cluster.planner.times import times_of, workload_of
from megatron_spear.config.schema import RunConfig

GPUS = 1024


def job(max_lag: int = 0, schedule: str = "continuous") -> Job:
    """70B, half of the GPUs train, half generate; 512 prompts of 16 answers."""
    config = RunConfig.model_validate(
        {
            "policy": {
                "tensor_parallel": 8,
                "pipeline_parallel": 4,
                "sequence_parallel": True,
                "precision": "bf16",
                "tokens_per_microbatch": 16384,
                "distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "recompute": "full",
            },
            "rollout": {
                "engine": "sglang",
                "prompts_per_step": 512,
                "group_size": 16,
                "max_new_tokens": 16000,
                "max_context": 16384,
                "max_slots": 1 << 17,
                "max_lag": max_lag,
                "schedule": schedule,
            },
            "weight_sync": {"transport": "sharded"},
            "env": {"max_turns": 1},
            "cluster": {
                "gpus_per_node": 8,
                "trainer_nodes": GPUS // 16,
                "engine_nodes": GPUS // 16,
                "servers": {"count": GPUS // 8, "program": "sglang", "tensor_parallel": 4},
            },
        }
    )
    made = Job.of_config(config, LLAMA_70B, mean_length=4000)
    return replace(made, lengths=replace(made.lengths, sampled=3700, spread=1.0))


def ranking() -> None:
    """All layouts that fit, by the time of a step, and other shares of the nodes."""
    one = job()
    began = time.perf_counter()
    ranked = best_layouts(one)
    splits = best_splits(one, ranked)
    seconds = time.perf_counter() - began
    print(f"{len(ranked)} layouts of 70B on {GPUS} GPUs, {len(splits)} shares: {seconds:.2f} s")
    for choice in (*ranked[:3], *splits[:1]):
        policy, times = choice.job.policy, choice.times
        print(
            f"  {times.total_s:.0f} s: TP{policy.tensor_parallel} CP{policy.context_parallel} "
            f"PP{policy.pipeline_parallel} DP{choice.job.data_parallel}, {choice.job.num_engines} "
            f"engines of TP{choice.job.engine_tensor_parallel}; {times.binds}"
        )


def simulation() -> None:
    """Rollouts ahead, simulated, with what the closed form says."""
    print(
        "max_lag  schedule       step s  (closed form)  gain  trainer idle  engines idle  mean lag"
    )
    first = 0.0
    for lag, schedule in (
        (0, "continuous"),
        (1, "continuous"),
        (1, "deterministic"),
        (2, "continuous"),
        (4, "continuous"),
    ):
        step = step_of(job(lag, schedule))
        times = times_of(step)
        began = time.perf_counter()
        simulated = simulate(workload_of(step, times))
        seconds = time.perf_counter() - began
        first = first or simulated.step_s
        print(
            f"{lag:7}  {schedule:13}  {simulated.step_s:6.0f}  {times.total_s:13.0f}  "
            f"{first / simulated.step_s:4.2f}  {simulated.trainer_idle:12.2f}  "
            f"{simulated.engine_idle:12.2f}  {simulated.mean_lag:8.2f}   ({seconds:.1f} s)"
        )


def figures() -> None:
    """The table of docs/planner-times.md."""
    print("| figure | published | predicted | error | role |")
    print("|---|---|---|---|---|")
    for figure in FIGURES:
        role = {"fixes": f"fixes `{figure.constant}`"}.get(figure.role, figure.role)
        predicted = figure.predict(CONSTANTS)
        print(
            f"| {figure.name} | {_digits(figure.published)} {figure.unit} | "
            f"{_digits(predicted)} | "
            f"{figure.error(CONSTANTS):+.0%} | {role} |"
        )


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", action="store_true", help="predictions against figures")
    if parser.parse_args().figures:
        figures()
        return
    ranking()
    simulation()


if __name__ == "__main__":
    main()
