"""Step times: what has to hold of them, and the closed form against the simulator."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_spear.cluster.planner.decoding import Engine, Play, rollout_time
from megatron_spear.cluster.planner.efficiency import CONSTANTS
from megatron_spear.cluster.planner.figures import machines, model
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.long_tail import LongTail
from megatron_spear.cluster.planner.machines import Ranks
from megatron_spear.cluster.planner.passes import flops_a_token
from megatron_spear.cluster.planner.published import LLAMA_70B, QWEN_30B_A3B
from megatron_spear.cluster.planner.simulator import simulate
from megatron_spear.cluster.planner.step import step_of
from megatron_spear.cluster.planner.times import step_times, times_of, workload_of
from megatron_spear.cluster.planner.training import Trainer, logprob_time, train_time
from megatron_spear.config.schema import RunConfig

SMALL = model(32, 4096, 14336, 32, 8, 128256)


def trainer(ranks: Ranks, **changes: Any) -> Trainer:
    return Trainer(
        model=SMALL,
        ranks=ranks,
        machines=machines(CONSTANTS),
        microbatch_tokens=8192,
        keys=1024,
        **changes,
    )


def job(**changes: Any) -> Job:
    """70B, 512 training GPUs and 128 servers of 4."""
    rollout = {
        "engine": "sglang",
        "prompts_per_step": 256,
        "group_size": 16,
        "max_new_tokens": 16000,
        "max_context": 16384,
        "max_slots": 65536,
    }
    policy = {
        "tensor_parallel": 8,
        "pipeline_parallel": 4,
        "sequence_parallel": True,
        "precision": "bf16",
        "tokens_per_microbatch": 16384,
        "distributed_optimizer": True,
    }
    config = RunConfig.model_validate(
        {
            "policy": policy | changes.pop("policy", {}),
            "rollout": rollout | changes.pop("rollout", {}),
            "weight_sync": {"transport": "sharded"} | changes.pop("weight_sync", {}),
            "env": {"type": "alfworld", "max_turns": 1},
            "replay": {"enabled": False} | changes.pop("replay", {}),
            "cluster": {
                "gpus_per_node": 8,
                "trainer_nodes": 64,
                "engine_nodes": 64,
                "servers": {"count": 128, "program": "sglang", "tensor_parallel": 4},
            },
        }
    )
    made = Job.of_config(config, LLAMA_70B, mean_length=4000)
    lengths = replace(made.lengths, sampled=3700, spread=1.0)
    return replace(made, lengths=lengths, **changes)


def test_flops_are_six_a_weight_and_token() -> None:
    weights = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) + 4096 * 128256
    assert flops_a_token(SMALL, 0) == 2 * weights
    assert flops_a_token(SMALL, 1000) - flops_a_token(SMALL, 0) == 4 * 32 * 1000 * 4096


def test_recomputation_costs_a_third_more_than_the_rest() -> None:
    plain = train_time(trainer(Ranks(data=8)), 1e6)
    again = train_time(trainer(Ranks(data=8), recompute=True), 1e6)
    assert again.work_s / plain.work_s == pytest.approx(4 / 3, rel=0.05)


def test_a_pass_without_gradient_is_a_third_of_training() -> None:
    ratio = logprob_time(trainer(Ranks(data=8)), 1e6).work_s
    ratio /= train_time(trainer(Ranks(data=8)), 1e6).work_s
    assert ratio == pytest.approx(1 / 3, rel=0.05)


def test_the_pipelines_beginning_and_end() -> None:
    """p - 1 of m + p - 1 stages of time stand still; v pieces a rank divide them."""
    tokens = 16 * 8192
    one = train_time(trainer(Ranks(pipeline=4)), tokens)
    pieces = train_time(trainer(Ranks(pipeline=4, virtual=4)), tokens)
    few = train_time(trainer(Ranks(pipeline=4)), tokens / 4)
    assert one.bubble_s > 3.5 * (pieces.bubble_s - (one.bubble_s - 3 / 16 * one.work_s))
    assert few.bubble_s / few.total_s > one.bubble_s / one.total_s
    assert train_time(trainer(Ranks()), tokens).bubble_s == 0


def test_exchanges_between_nodes_cost_more_than_inside() -> None:
    inside = train_time(trainer(Ranks(tensor=8)), 1e6).exchange_s
    outside = train_time(trainer(Ranks(tensor=16)), 1e6).exchange_s
    assert outside > inside > 0
    experts = trainer(Ranks(data=16, expert=8))
    near = train_time(replace(experts, model=QWEN_30B_A3B), 1e6)
    far = train_time(replace(experts, model=QWEN_30B_A3B, ranks=Ranks(data=16, expert=16)), 1e6)
    assert far.exchange_s > 3 * near.exchange_s


def test_overlap_hides_gradients_behind_the_backward_pass() -> None:
    shown = train_time(trainer(Ranks(data=16)), 16 * 8192)
    hidden = train_time(
        trainer(Ranks(data=16), overlap_grad_reduce=True, overlap_param_gather=True), 16 * 8192
    )
    assert shown.reduce_s > hidden.reduce_s >= 0
    assert shown.total_s - hidden.total_s == pytest.approx(shown.reduce_s - hidden.reduce_s)


def test_an_offloaded_optimizer_takes_longer() -> None:
    here = train_time(trainer(Ranks(data=8)), 1e5)
    there = train_time(trainer(Ranks(data=8), offload=1.0), 1e5)
    assert there.optimizer_s > 5 * here.optimizer_s


def engine(**changes: Any) -> Engine:
    return Engine(
        **{"model": SMALL, "machines": machines(CONSTANTS), "tensor": 1, "slots": 64} | changes
    )


def test_a_decode_step_of_one_context_reads_the_weights() -> None:
    weights = 2 * (flops_a_token(SMALL, 0) / 2)
    parts = engine().parts_of_decode(np.array([1.0]), 0.0)
    assert parts["reading weights"][0] == pytest.approx(weights / (3.35e12 * 0.9))
    assert parts["reading keys and values"][0] == 0
    half = engine(fp8=True).parts_of_decode(np.array([1.0]), 0.0)
    assert 0.5 < half["reading weights"][0] / parts["reading weights"][0] < 0.6
    more = engine().parts_of_decode(np.array([64.0]), 1000.0)
    assert more["reading keys and values"][0] == pytest.approx(
        64 * 1000 * 4 * 32 * 1024 / (3.35e12 * 0.9)
    )


def test_few_contexts_read_few_experts() -> None:
    mixture = engine(model=QWEN_30B_A3B)
    one, many = (
        mixture.parts_of_decode(np.array([b]), 0.0)["reading weights"][0] for b in (1.0, 128.0)
    )
    assert many > 5 * one


def play(**changes: Any) -> Play:
    lengths = LongTail(mean=500, longest=500, spread=0.0)
    return Play(
        **{"num_prompts": 8, "group_size": 8, "prompt": 0.0, "observed": 0.0, "lengths": lengths}
        | changes
    )


def test_equal_lengths_roll_out_in_waves() -> None:
    one = rollout_time(engine(), 1, play())
    steps = [float(engine().decode_s(np.array([64.0]), n + 0.5)[0]) for n in range(500)]
    assert one.alone_s == pytest.approx(sum(steps), rel=0.01)
    two = rollout_time(engine(slots=32), 1, play())
    half = float(engine().decode_s(np.array([32.0]), 250.0)[0])
    assert two.alone_s == pytest.approx(2 * 500 * half, rel=0.30)  # a queue is filled evenly


def test_a_long_tail_is_paid_at_the_end() -> None:
    tail = LongTail(mean=500, longest=8000, spread=1.2)
    uneven, even = rollout_time(engine(), 1, play(lengths=tail)), rollout_time(engine(), 1, play())
    assert uneven.alone_s > 3 * even.alone_s
    assert uneven.work_s < 1.5 * even.work_s


def test_turns_wait_for_the_environment() -> None:
    waiting = rollout_time(engine(), 1, play(num_turns=5, env_s=2.0))
    assert waiting.alone_s == pytest.approx(rollout_time(engine(), 1, play()).alone_s + 8.0)


def test_windows_of_history_are_contexts_of_their_own() -> None:
    """20 turns, each a context of 500 given and 10 sampled tokens."""
    made = job()
    lengths = replace(made.lengths, mean=510, sampled=10, turns=1, contexts=20, spread=0.0)
    windows = step_of(replace(made, lengths=lengths)).play
    assert windows.mean_tokens == pytest.approx(20 * 510)
    assert windows.num_turns == 20
    assert windows.mean_context == pytest.approx(500 + 5)
    grown = replace(made.lengths, mean=20 * 510, sampled=200, turns=20, contexts=1, spread=0.0)
    one = step_of(replace(made, lengths=grown)).play
    assert one.mean_tokens == pytest.approx(20 * 510)
    assert one.mean_context == pytest.approx(500 + (19 * 500 + 200) / 2)


def test_taking_turns_adds_up() -> None:
    times = step_times(job())
    parts = times.rollout_s + times.old_logprobs_s + times.replay_s + times.train_s
    assert times.total_s == pytest.approx(parts + times.weight_sync_s)
    assert times.trainer_idle == pytest.approx(times.rollout_s / times.total_s)
    assert 0.1 < times.mfu < 0.6
    assert times.binds.startswith("rollout")


def test_replay_costs_its_rows() -> None:
    plain = job()
    replayed = replace(plain, replayed_trajectories=plain.trained_trajectories // 4)
    without, with_it = step_times(plain), step_times(replayed)
    assert without.replay_s == 0
    assert with_it.replay_s == pytest.approx(without.train_s / 4, rel=0.1)
    needs = step_times(replace(replayed, replay_needs_logprobs=True))
    assert needs.replay_s > 1.2 * with_it.replay_s


def test_log_prob_passes_are_counted() -> None:
    one = step_times(replace(job(), recomputes_old_logprobs=True, has_reference=False))
    two = step_times(replace(job(), recomputes_old_logprobs=True, has_reference=True))
    none = step_times(replace(job(), recomputes_old_logprobs=False, has_reference=False))
    assert two.old_logprobs_s == pytest.approx(2 * one.old_logprobs_s)
    assert none.old_logprobs_s == 0


@pytest.mark.parametrize(
    ("lag", "schedule"),
    [(0, "continuous"), (1, "continuous"), (1, "deterministic"), (2, "continuous")],
)
def test_totals_are_near_the_simulators(lag: int, schedule: str) -> None:
    step = step_of(job(rollout={"max_lag": lag, "schedule": schedule}))
    times = times_of(step)
    simulated = simulate(workload_of(step, times), steps=4)
    assert times.total_s == pytest.approx(simulated.step_s, rel=0.2)
    assert times.trainer_idle == pytest.approx(simulated.trainer_idle, abs=0.15)


def test_engines_on_the_trainers_gpus_take_turns_whatever_the_lag() -> None:
    ahead = replace(job(rollout={"max_lag": 1}), shares_gpus=True)
    assert step_times(ahead).total_s == pytest.approx(
        step_times(replace(job(), shares_gpus=True)).total_s
    )


def test_what_binds_is_named() -> None:
    slow = job(policy={"tensor_parallel": 1, "pipeline_parallel": 1, "sequence_parallel": False})
    assert "train" in step_times(replace(slow, trainer_gpus=8)).binds
    whole = job(weight_sync={"transport": "broadcast"})
    assert step_times(whole).weight_sync_s > 10 * step_times(job()).weight_sync_s


def test_a_job_on_cpus_has_times() -> None:
    config = RunConfig.model_validate({"model": {"path": None}})
    made = Job.of_config(config, model(4, 128, 512, 4, 2, 512, head=32))
    times = step_times(made)
    assert times.total_s > 0
    assert made.is_cpu


def test_hundreds_of_layouts_take_well_under_a_second() -> None:
    made = job()
    began = time.process_time()
    for _ in range(100):
        step_times(made)
    assert (time.process_time() - began) / 100 < 3e-3


def test_no_torch_is_needed() -> None:
    code = (
        "import json, sys; import megatron_spear.cluster.planner.published;"
        "print(json.dumps([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == []
