"""A preset comes over the defaults and under the file and the command line."""

from pathlib import Path

import pytest

from megatron_spear.config.check import check_config
from megatron_spear.config.fingerprint import config_hash
from megatron_spear.config.load import CONFIG_NAME, dump_config, load_config
from megatron_spear.config.presets.layouts import PRESETS
from megatron_spear.config.schema import PolicySection
from megatron_spear.errors import ConfigError

NAME = "qwen3-30b-a3b-128gpus"
LAYOUT = {
    "tensor_parallel": 4,
    "pipeline_parallel": 1,
    "expert_parallel": 8,
    "sequence_parallel": True,
    "precision": "bf16",
    "tokens_per_microbatch": 16384,
    "recompute": "none",
    "distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_every_preset_loads_by_its_name(preset) -> None:
    config = load_config(None, [f"preset={preset.name}"])
    assert config.preset == preset.name == f"{preset.model}-{preset.gpus}gpus"
    assert config.policy == PolicySection(**preset.policy)
    assert set(preset.policy) == set(LAYOUT)
    assert check_config(config.model_copy(update={"model": _loaded(config)}), preset.gpus) == []


def _loaded(config):
    return config.model.model_copy(update={"path": Path("model")})


def test_defaults_then_preset_then_file_then_command_line(tmp_path: Path) -> None:
    text = "policy:\n  tokens_per_microbatch: 1000\n  pipeline_parallel: 4\n"
    path = write(tmp_path, text)
    given = [f"preset={NAME}", "policy.pipeline_parallel=3"]
    changed = {"tokens_per_microbatch": 1000, "pipeline_parallel": 3}
    policy = load_config(path, given).policy
    assert policy == PolicySection(**LAYOUT | changed)
    assert policy.optimizer == PolicySection().optimizer
    in_file = write(tmp_path, f"preset: {NAME}\n{text}")
    assert load_config(in_file, given[1:]).policy == policy
    other = load_config(in_file, ["preset=llama-3.1-70b-512gpus"]).policy
    assert (other.tensor_parallel, other.pipeline_parallel) == (8, 4), "the file's 4 stays"
    assert load_config(in_file, ["preset=null"]).policy.tensor_parallel == 1


def test_a_resumed_run_keeps_its_layout_or_takes_the_preset_named_now(tmp_path: Path) -> None:
    run = load_config(None, [f"preset={NAME}", "policy.tokens_per_microbatch=1000"])
    (tmp_path / CONFIG_NAME).write_text(dump_config(run))
    resumed = load_config(None, [f"resume={tmp_path}"])
    assert (resumed.preset, resumed.policy) == (NAME, run.policy)
    moved = load_config(
        None,
        [f"resume={tmp_path}", "preset=qwen3-30b-a3b-512gpus", "policy.tokens_per_microbatch=99"],
    )
    assert (moved.policy.pipeline_parallel, moved.policy.tokens_per_microbatch) == (2, 99)
    assert config_hash(moved) == config_hash(run), "only the layout is another"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5-7b-32gpu", "no such preset; did you mean qwen2.5-7b-32gpus? (override 'preset="),
        ("Qwen2.5-7B-32GPUs", "no such preset; did you mean qwen2.5-7b-32gpus?"),
        ("zzz", "no such preset; expected one of qwen2.5-1.5b-8gpus, "),
        ("", "no such preset; expected one of"),
    ],
)
def test_an_unknown_name_is_told_with_the_one_meant(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_config(None, [f"preset={name}", "run.steps=0"])
    assert f"preset: got {name!r}, {expected}" in str(told.value)
    assert "run.steps: got 0" in str(told.value), "the other mistakes are told too"


@pytest.mark.parametrize("value", ["3", "[a]", "{a: 1}"])
def test_a_name_that_is_no_text(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"preset: got .*, expected a text, or null \(a.yaml"):
        load_config(write(tmp_path, f"preset: {value}\n"))


def test_a_preset_needs_a_model_folder() -> None:
    config = load_config(None, ["preset=qwen2.5-1.5b-8gpus"])
    (line,) = check_config(config, 8)
    assert line.startswith("preset=qwen2.5-1.5b-8gpus is a layout of Qwen/Qwen2.5-1.5B, and model.")
    assert check_config(config, 8, "evaluate") == []
