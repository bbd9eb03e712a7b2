"""A run's settings as the planner's numbers, chips and models."""

from pathlib import Path

import pytest

from megatron_spear.cluster.planner.chips import CHIPS, cpu_rank
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.models import planned_model
from megatron_spear.cluster.planner.refusal import refusals
from megatron_spear.config.cluster import ClusterSection
from megatron_spear.config.load import load_config
from megatron_spear.conversion.shape import load_config as load_folder
from megatron_spear.conversion.shape import model_shape
from megatron_spear.envs.family import family_of
from megatron_spear.errors import CheckpointError, ConfigError
from megatron_spear.trainer.models import initial_model

QUICKSTART = Path(__file__).parents[3] / "examples" / "alfworld" / "quickstart.yaml"


def job_of(*settings: str, mean_length: int | None = None) -> Job:
    config = load_config(None, settings)
    return Job.of_config(config, planned_model(config)[1], mean_length=mean_length)


def test_chips_are_those_of_the_setting() -> None:
    names = ClusterSection.model_fields["chip"].annotation
    assert set(CHIPS) == set(getattr(names, "__args__", ()))
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.fp8_flops >= chip.bf16_flops > 1e14
        assert chip.hbm_bytes_per_s > chip.nvlink_bytes_per_s > chip.nic_bytes_per_s


def test_cpu_ranks_share_the_machine() -> None:
    one, two = cpu_rank(1), cpu_rank(2)
    assert one.memory_bytes // 2 == two.memory_bytes
    assert one.bf16_flops >= two.bf16_flops


def test_gpus_that_train_and_generate() -> None:
    nodes = ("cluster.gpus_per_node=8", "cluster.trainer_nodes=3", "rollout.engine=sglang")
    own = job_of(*nodes, "cluster.engine_nodes=1", "cluster.servers.count=4",
                 "cluster.servers.tensor_parallel=2", "policy.tensor_parallel=2")  # fmt: skip
    assert (own.trainer_gpus, own.engine_gpus, own.num_gpus, own.node_gpus) == (24, 8, 32, 32)
    assert (own.num_engines, own.data_parallel, own.shares_gpus) == (4, 12, False)
    same = job_of(*nodes, "rollout.colocated=true", "cluster.servers.count=12",
                  "cluster.servers.tensor_parallel=2")  # fmt: skip
    assert (same.num_gpus, same.engine_gpus, same.shares_gpus) == (24, 24, True)
    beside = job_of(*nodes, "cluster.ranks_per_node=6", "cluster.servers.count=3",
                    "cluster.servers.tensor_parallel=2")  # fmt: skip
    assert (beside.trainer_gpus, beside.engine_gpus, beside.num_gpus) == (18, 6, 24)
    embedded = job_of()
    assert embedded.is_cpu and embedded.is_embedded and embedded.num_gpus == 1


def test_lengths() -> None:
    own = job_of("rollout.max_context=1000", "rollout.max_new_tokens=10", "env.max_turns=20")
    assert (own.lengths.mean, own.lengths.sampled, own.lengths.contexts) == (500, 200, 1)
    told = job_of("rollout.max_context=1000", mean_length=700)
    assert told.lengths.mean == 700
    window = job_of("env.history={window: 2}", "env.max_turns=20")
    assert (window.lengths.contexts, window.lengths.turns) == (20, 1)


def test_trajectories_and_micro_batches() -> None:
    own = job_of("rollout.prompts_per_step=8", "rollout.group_size=8", "replay.enabled=false",
                 "algorithm.keep_groups_fraction=0.5", "rollout.max_context=1000",
                 "policy.tokens_per_microbatch=1000")  # fmt: skip
    assert (own.trajectories, own.trained_trajectories, own.microbatches) == (64, 32, 16)
    assert own.replayed_trajectories == 0 and not own.replay_needs_logprobs


def test_the_tiny_model_is_the_one_that_a_run_makes(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"model.cache_dir={tmp_path}"])
    name, shape = planned_model(config)
    made = model_shape(load_folder(initial_model(config.model, family_of(config.env))))
    sizes = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_groups", "head_dim",
             "vocab_size", "tied", "qk_norm", "qkv_bias")  # fmt: skip
    assert {s: getattr(shape, s) for s in sizes} == {s: getattr(made, s) for s in sizes}
    assert name == "tiny model"


def test_models_by_name_preset_and_folder(tmp_path: Path) -> None:
    config = load_config(None, ["preset=qwen3-8b-8gpus"])
    assert planned_model(config)[0] == "qwen3-8b"
    assert planned_model(config, "qwen2.5-7b")[1].num_heads == 28
    made = load_config(None, [f"model.cache_dir={tmp_path}"])
    folder = initial_model(made.model, family_of(made.env))
    for other in folder.glob("[!c]*"):
        other.unlink()  # config.json is enough
    assert planned_model(load_config(None, [f"model.path={folder}"]))[0] == folder.name
    assert planned_model(config, str(folder))[1].num_layers == 4
    with pytest.raises(ConfigError, match=r"did you mean llama-3\.1-70b"):
        planned_model(config, "llama-3.1-7b")


def test_a_model_that_is_elsewhere_is_the_presets(tmp_path: Path) -> None:
    preset, gone = "preset=qwen2.5-7b-8gpus", f"model.path={tmp_path / 'gone'}"
    assert planned_model(load_config(None, [preset, gone]))[0] == "qwen2.5-7b"
    with pytest.raises(CheckpointError, match="model folder"):
        planned_model(load_config(None, [preset, f"model.path={tmp_path}"]))
    with pytest.raises(CheckpointError, match="model folder"):
        planned_model(load_config(None, [gone]))


def test_contexts_beyond_the_models_positions_are_refused() -> None:
    settings = ("preset=qwen3-32b-32gpus", "cluster.trainer_nodes=4", "cluster.gpus_per_node=8")
    assert not list(refusals(job_of(*settings, "rollout.max_context=40960")))
    (told,) = refusals(job_of(*settings, "rollout.max_context=40961"))
    assert "rollout.max_context=40961 is above the model's max_position_embeddings=40960" in told
