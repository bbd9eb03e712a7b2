"""Layouts that are found: possible, fitting, ranked, and told by what they change."""

from dataclasses import replace

import pytest

from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.memory import training_memory
from megatron_spear.cluster.planner.models import planned_model
from megatron_spear.cluster.planner.plan import GAIN, NUM_SHOWN, make_plan
from megatron_spear.cluster.planner.search import best_layouts, best_splits, judged, why
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.layout_fit import model_problems

LONG = (
    "rollout.max_context=8192",
    "rollout.max_new_tokens=4096",
    "env.max_turns=1",
    "rollout.prompts_per_step=64",
    "rollout.group_size=16",
    "rollout.max_slots=1024",
)


def config_of(preset: str, *settings: str) -> RunConfig:
    """64 GPUs that train and 32 that generate."""
    nodes = ("cluster.gpus_per_node=8", "cluster.trainer_nodes=8", "cluster.engine_nodes=4")
    servers = ("rollout.engine=sglang", "cluster.servers.count=8",
               "cluster.servers.tensor_parallel=4", "cluster.servers.program=sglang")  # fmt: skip
    return load_config(None, [f"preset={preset}", *nodes, *servers, *LONG, *settings])


def job_of(preset: str, *settings: str) -> Job:
    config = config_of(preset, *settings)
    return Job.of_config(config, planned_model(config)[1])


@pytest.mark.parametrize("preset", ["qwen2.5-32b-32gpus", "qwen3-30b-a3b-32gpus"])
def test_all_found_are_possible_and_fit_in_order(preset: str) -> None:
    job = job_of(preset)
    found = best_layouts(job)
    assert len(found) >= 10
    for choice in found:
        policy = choice.job.policy
        assert not list(model_problems(policy, job.shape, 64))
        assert training_memory(choice.job).short == 0
        assert policy.tokens_per_microbatch >= 8192 and 8 % policy.tensor_parallel == 0
        assert policy.sequence_parallel == (policy.tensor_parallel > 1)
    seconds = [choice.times.total_s for choice in found]
    assert seconds == sorted(seconds)
    assert len({tuple(choice.changes(job).items()) for choice in found}) == len(found)


def test_a_poor_layout_is_bettered_with_reasons() -> None:
    poor = ("policy.pipeline_parallel=8", "policy.tokens_per_microbatch=32768")
    job = job_of("qwen2.5-32b-32gpus", *poor)
    own, best = judged(job), best_layouts(job)[0]
    assert best.times.train_s < 0.6 * own.times.train_s
    assert best.changes(job)["pipeline_parallel"] < 8
    assert "fewer stages to fill" in why(best, own)


def test_recomputation_only_where_it_does_not_fit_otherwise() -> None:
    for choice in best_layouts(job_of("qwen2.5-32b-32gpus")):
        if choice.job.policy.recompute == "full":
            least = choice.job.with_policy(recompute="none", tokens_per_microbatch=8192)
            assert training_memory(least).short


def test_long_contexts_may_be_split() -> None:
    short = best_layouts(job_of("qwen2.5-7b-32gpus"))
    long = best_layouts(job_of("qwen2.5-7b-32gpus", "rollout.max_context=65536"))
    assert {choice.job.policy.context_parallel for choice in short} == {1}
    assert {choice.job.policy.context_parallel for choice in long} > {1, 2}


def test_splits_move_nodes_to_where_they_are_needed() -> None:
    job = job_of("qwen2.5-7b-32gpus", "weight_sync.transport=sharded")
    splits = best_splits(job, best_layouts(job))
    assert {split.job.num_gpus for split in splits} == {96}
    by_share = {split.job.engine_gpus: split.times for split in splits}
    assert by_share[72].rollout_s < by_share[24].rollout_s
    assert by_share[72].train_s > by_share[24].train_s
    assert not best_splits(replace(job, shares_gpus=True), best_layouts(job))


def test_a_plan_shows_what_is_faster_by_more_than_a_little() -> None:
    plan = make_plan(config_of("qwen2.5-32b-32gpus", "policy.pipeline_parallel=8"))
    assert plan.fits and plan.own and 0 < len(plan.better) <= NUM_SHOWN
    for choice in plan.better:
        assert choice.times.total_s < plan.own.times.total_s * (1 - GAIN)
    best = plan.better[0].job.policy.model_dump(exclude={"fp8", "optimizer"})
    settings = [f"policy.{name}={value}" for name, value in best.items()]
    again = make_plan(config_of("qwen2.5-32b-32gpus", *settings))
    assert not again.better


def test_a_plan_of_what_does_not_fit_shows_what_does() -> None:
    one_node = ("cluster.trainer_nodes=1",)
    plan = make_plan(config_of("qwen2.5-32b-32gpus", *one_node))
    assert not plan.fits and plan.better
    assert {c.changes(plan.job)["optimizer_offload"] for c in plan.better} == {1.0}
    impossible = make_plan(config_of("qwen2.5-7b-32gpus", "policy.tensor_parallel=8"))
    assert not impossible.fits and impossible.own is None and impossible.better


def test_notes_say_what_is_odd() -> None:
    def notes(*settings: str, mean_length: int | None = 4096) -> str:
        config = config_of("qwen2.5-7b-32gpus", *settings)
        return "\n".join(make_plan(config, mean_length=mean_length).warnings)

    assert notes() == ""
    assert "mean context length 4,096 tokens is assumed" in notes(mean_length=None)
    assert "some wait" in notes(
        "rollout.max_slots=8192", "rollout.max_requests_per_server=1024",
        "rollout.prompts_per_step=1024", "rollout.max_context=32768",
    )  # fmt: skip
    assert "8 of 96 GPUs have nothing to do" in notes("cluster.servers.count=6")
    assert "policy.precision=fp32" in notes("policy.precision=fp32")
    assert "some have nothing to train on" in notes(
        "rollout.prompts_per_step=1", "rollout.group_size=4"
    )
