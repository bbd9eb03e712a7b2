"""The plan for people and for programs."""

import json

import pytest

from megatron_spear.cluster.planner.plan import make_plan
from megatron_spear.cluster.planner.report import plan_text, text_of, values_of
from megatron_spear.config.load import load_config
from megatron_spear.config.schema import RunConfig

WIDTH, HEIGHT = 118, 45
"""Of one screen; settings of a layout and what is refused may be longer."""


def config_of(*settings: str) -> RunConfig:
    """Llama 3.1 70B, 64 GPUs that train and 32 that generate."""
    return load_config(None, [
        "preset=llama-3.1-70b-32gpus", "cluster.gpus_per_node=8", "cluster.trainer_nodes=8",
        "cluster.engine_nodes=4", "cluster.servers.count=8", "cluster.servers.tensor_parallel=4",
        "rollout.engine=sglang", "rollout.max_context=8192", "rollout.max_new_tokens=4096",
        "env.max_turns=1", "rollout.prompts_per_step=64", "rollout.group_size=16",
        "rollout.max_slots=1024", *settings,
    ])  # fmt: skip


def test_one_screen_with_all_parts() -> None:
    text = plan_text(config_of())
    lines = text.splitlines()
    assert len(lines) <= HEIGHT
    assert all(len(line) <= WIDTH for line in lines if "_parallel=" not in line)
    title, layout = lines[:2]
    assert title == "llama-3.1-70b, 70.6 B parameters; 96 x h100: 64 train, 32 generate"
    assert layout == "TP 8 x PP 2 x DP 4, 32,768 tokens a micro-batch, recompute full"
    for part in (
        "Memory of the fullest rank (stage 1 of 2, in training)",
        "  weights  ", "  gradients  ", "  optimizer  ", "  activations  ", "  CUDA and NCCL  ",
        "Memory of a GPU that generates (TP 4, 8 servers): 68.0 GB of 80.0 GB", "  KV cache  ",
        "Step: ", "binds: ", "  rollout  ", "  old log-probs  ", "  train  ", "  replay  ",
        "trajectories replayed", "  weight update  ", "Better layouts (of ", "note: mean context",
    ):  # fmt: skip
        assert part in text, part
    assert "DOES NOT FIT" not in text


def test_rollouts_ahead_are_simulated_where_engines_have_gpus_of_their_own() -> None:
    plan = make_plan(config_of("rollout.max_lag=1", "weight_sync.transport=sharded"))
    assert plan.ahead and plan.own and plan.ahead.max_lag == 1
    assert plan.ahead.step_s == pytest.approx(plan.own.times.total_s, rel=0.5)
    assert "  simulated with lengths drawn: a step " in text_of(plan)
    assert "versions old, at most 1" in text_of(plan)
    assert values_of(plan)["rollouts_ahead"]["step_s"] == plan.ahead.step_s
    assert make_plan(config_of()).ahead is None


def test_what_does_not_fit_is_said_first() -> None:
    text = plan_text(config_of("cluster.trainer_nodes=2"))
    assert text.splitlines()[2].startswith("DOES NOT FIT: 70.6 B parameters on 16 x h100")
    assert "short by " in text and "The fastest layouts (of" in text


def test_an_impossible_layout_has_no_times_but_better_ones() -> None:
    text = plan_text(config_of("policy.tensor_parallel=16"))
    assert "DOES NOT FIT: the model's num_key_value_heads=8 is not a multiple" in text
    assert "Step: " not in text and "The fastest layouts (of" in text


def test_nothing_fits() -> None:
    text = plan_text(config_of("cluster.gpus_per_node=1", "cluster.trainer_nodes=1"))
    assert "No layout of 1 h100 fits" in text


def test_values_are_those_of_the_text() -> None:
    plan = make_plan(config_of())
    values = json.loads(json.dumps(values_of(plan)))
    memory, times = values["memory"], values["times"]
    assert values["fits"] and values["gpus"] == {"total": 96, "train": 64, "generate": 32}
    assert sum(memory["parts"].values()) == memory["total"] < memory["limit"]
    assert f"{memory['total'] / 1e9:.1f} GB of 80.0 GB" in text_of(plan)
    phases = ("rollout_s", "old_logprobs_s", "replay_s", "train_s", "weight_sync_s")
    in_turn = sum(times[phase] for phase in phases)
    assert in_turn == pytest.approx(times["total_s"])
    assert values["engine_memory"]["contexts"] == plan.engine.contexts if plan.engine else False
    assert values["weight_update"]["needed_bytes"] > 141e9
    first = values["better_layouts"][0]
    assert first["step_s"] < times["total_s"]
    assert all(name.startswith("policy.") for name in first["settings"])


@pytest.mark.parametrize(
    "given", [(), ("policy.tensor_parallel=1", "policy.sequence_parallel=false",
                   "policy.distributed_optimizer=false", "policy.overlap_grad_reduce=false",
                   "policy.overlap_param_gather=false", "policy.pipeline_parallel=1")]
)  # fmt: skip
def test_the_settings_of_a_better_layout_can_be_given_back(given: tuple[str, ...]) -> None:
    """What a plan shows is what a plan of it gives."""
    plan = make_plan(config_of(*given))
    first = values_of(plan)["better_layouts"][0]
    settings = [f"{name}={value}" for name, value in first["settings"].items()]
    other = make_plan(config_of(*given, *settings))
    assert other.fits and other.own
    assert other.own.times.total_s == first["step_s"]
    assert other.own.memory.total == first["memory"]
