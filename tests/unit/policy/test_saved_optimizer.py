"""The optimizer's state in checkpoints: there after any update, and put together on one rank."""

import json
from pathlib import Path

import pytest

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder


def make(folder: Path, section: PolicySection, ctx: ParallelContext) -> MegatronPolicy:
    return MegatronPolicy.from_hf(folder, section, OptimizerSection(lr=1e-2), 10, ctx)


def train(policy: MegatronPolicy, *scheduled: bool) -> list[float]:
    packed = pack(*random_samples(), tokens_per_microbatch=200)
    return [
        policy.train_step(packed, WeightedNll(), scheduled=one)["loss/total"] for one in scheduled
    ]


@pytest.mark.parametrize("distributed", [False, True])
def test_a_state_after_unscheduled_updates_alone_goes_on(
    distributed: bool, tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    section = PolicySection(distributed_optimizer=distributed)
    policy, other = (make(tmp_path / "hf", section, ctx) for _ in range(2))
    train(policy, False, False)
    policy.save(tmp_path / "state")
    expected = train(policy, True, True)
    other.load(tmp_path / "state")
    assert (other.num_steps, other.num_updates) == (0, 2)
    assert train(other, True, True) == expected


def test_a_state_of_before_updates_were_counted_is_read(
    tmp_path: Path, ctx: ParallelContext
) -> None:
    tiny_hf_folder(tmp_path / "hf")
    policy, other = (make(tmp_path / "hf", PolicySection(), ctx) for _ in range(2))
    train(policy, True, True)
    policy.save(tmp_path / "state")
    expected = train(policy, True)
    file = tmp_path / "state" / "policy.json"
    about = json.loads(file.read_text())
    del about["num_updates"]
    file.write_text(json.dumps(about))
    other.load(tmp_path / "state")
    assert other.num_updates == 2 and train(other, True) == expected
