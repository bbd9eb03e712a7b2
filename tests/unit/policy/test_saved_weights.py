"""Checkpoints of the policy are read without it: by the converter, and by its names."""

from pathlib import Path

import pytest
import torch

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.conversion.convert import Layout, hf_to_megatron, megatron_to_hf
from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.conversion.torch_dist import TorchDistReader
from megatron_spear.data.packing import pack
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen2", "Qwen3Moe"])
def test_a_trained_state_converts(architecture: str, tmp_path: Path, ctx: ParallelContext) -> None:
    hf = tmp_path / "hf"
    tiny_hf_folder(hf, architecture, tie_word_embeddings=architecture == "Qwen2")
    optimizer = OptimizerSection(lr=1e-3)
    policy = MegatronPolicy.from_hf(hf, PolicySection(), optimizer, 10, ctx)
    policy.train_step(pack(*random_samples(), tokens_per_microbatch=200), WeightedNll())
    policy.save(tmp_path / "policy")
    megatron_to_hf(tmp_path / "policy", tmp_path / "back", config=hf)
    with HfReader(tmp_path / "back") as reader:
        exported = {name: tensor for name, tensor in policy.export_weights() if tensor is not None}
        assert set(reader.names) == set(exported)
        for name, tensor in exported.items():
            assert torch.equal(reader.get(name), tensor), name


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen2", "Qwen3Moe"])
def test_the_converter_stores_what_megatron_does(
    architecture: str, tmp_path: Path, ctx: ParallelContext
) -> None:
    """The same keys, shapes and dtypes, extra states included; Megatron 0.19 stores its state
    without tensors beside them too, and reads ``common.pt`` where there is none."""
    hf = tmp_path / "hf"
    tiny_hf_folder(hf, architecture)
    MegatronPolicy.from_hf(hf, PolicySection(), OptimizerSection(), 10, ctx).save(tmp_path / "one")
    hf_to_megatron(hf, tmp_path / "other", Layout())
    one, other = (
        TorchDistReader(tmp_path / name)._metadata.state_dict_metadata for name in ("one", "other")
    )
    besides = {key for key in one if key.startswith(("rng_state", "common_state"))}
    assert set(one) - besides == set(other)
    for key, entry in other.items():
        assert type(entry) is type(one[key])
        if hasattr(entry, "size"):
            assert (entry.size, entry.properties.dtype) == (
                one[key].size,
                one[key].properties.dtype,
            )
