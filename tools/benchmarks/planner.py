#!/usr/bin/env python3
"""Time of the planner for 70B on 1,024 GPUs, of the simulator, and predictions against figures.

python tools/benchmarks/planner.py [--figures]

The aim is a ranking of all layouts under 2 s on one core. ``--figures`` prints the published
figures with what is predicted, as docs/planner-times.md shows them.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

from megatron_spear.cluster.planner.efficiency import CONSTANTS
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.published import FIGURES, LLAMA_70B
from megatron_spear.cluster.planner.simulator import simulate
from megatron_spear.cluster.planner.step import step_of
from megatron_spear.cluster.planner.times import StepTimes, step_times, times_of, workload_of
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


def layouts() -> Iterator[Job]:
    """Training layouts and shares of the GPUs."""
    base = job()
    for trainer_gpus in (GPUS // 4, GPUS // 2, 3 * GPUS // 4):
        for tensor in (1, 2, 4, 8):
            for pipeline in (1, 2, 4, 5, 8, 10, 16):
                for context in (1, 2, 4):
                    if trainer_gpus % (tensor * pipeline * context):
                        continue
                    changed = base.with_policy(
                        tensor_parallel=tensor,
                        pipeline_parallel=pipeline,
                        context_parallel=context,
                        sequence_parallel=tensor > 1,
                    )
                    for servers in (4, 8):
                        yield replace(
                            changed,
                            trainer_gpus=trainer_gpus,
                            engine_gpus=GPUS - trainer_gpus,
                            engine_tensor_parallel=servers,
                        )


def ranking() -> None:
    """All layouts by the time of a step."""
    began = time.perf_counter()
    ranked: list[tuple[StepTimes, Job]] = sorted(
        ((step_times(one), one) for one in layouts()), key=lambda pair: pair[0].total_s
    )
    seconds = time.perf_counter() - began
    print(f"{len(ranked)} layouts of 70B on {GPUS} GPUs ranked in {seconds:.2f} s")
    print(f"  {seconds / len(ranked) * 1e3:.2f} ms a layout")
    for times, one in ranked[:3]:
        policy = one.policy
        print(
            f"  {times.total_s:.0f} s: TP{policy.tensor_parallel} CP{policy.context_parallel} "
            f"PP{policy.pipeline_parallel} DP{one.data_parallel}, {one.num_engines} engines of "
            f"TP{one.engine_tensor_parallel}; {times.binds}"
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
