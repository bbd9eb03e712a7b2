"""Each rank's random generators go on where its own were; at another layout they begin anew."""

from pathlib import Path
from typing import Any

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import tiny_hf_folder


def draws() -> list[list[float]]:
    """From torch's generator, and from the one that differs between tensor-parallel ranks."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    found = [torch.rand(2).tolist()]
    with get_cuda_rng_tracker().fork():
        return [*found, torch.rand(2).tolist()]


def save_and_load(root: Path) -> dict[str, Any]:
    """What a rank draws after the save, after the load, at another layout, at the start."""
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy

    found: dict[str, Any] = {}
    for name, sizes in (("same", {"tensor_parallel": 2}), ("other", {"pipeline_parallel": 2})):
        section = PolicySection(**sizes)
        ctx = parallel.initialize(section, seed=3, timeout_s=60)
        policy = MegatronPolicy.from_hf(root / "hf", section, OptimizerSection(), 10, ctx)
        parallel.seed_generators(3)
        found[f"start of {name}"] = draws()
        if name == "same":
            policy.save(root / "state")
            found["expected"] = draws()
        draws()
        policy.load(root / "state")
        found[name] = draws()
        parallel.destroy(keep_world=True)
    return found


def test_over_a_resume(tmp_path: Path) -> None:
    tiny_hf_folder(tmp_path / "hf")
    ranks = run_ranks(save_and_load, 2, tmp_path, timeout_s=60)
    for found in ranks:
        assert found["same"] == found["expected"] != found["start of same"]
        assert found["other"] == found["start of other"]
    first, second = (found["same"] for found in ranks)
    assert first[0] == second[0] and first[1] != second[1]
