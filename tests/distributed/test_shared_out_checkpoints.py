"""Data-parallel ranks share the optimizer's state out: the first one collects and writes it, each
reads what it has a piece of."""

from pathlib import Path
from typing import Any

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.data.packing import pack
from megatron_spear.testing.nll import WeightedNll
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import random_samples, tiny_hf_folder

BYTES = 3 * 4
"""Of float32 weight and two moments, for a parameter."""


def _num_bytes(state: Any) -> int:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    tensors = (getattr(value, "data", None) for value in nested_values(state["param_state"]))
    return sum(tensor.nbytes for tensor in tensors)


def _save_and_load(folder: Path, model: str) -> dict[str, Any]:
    """In bytes a parameter of this rank: what is stored and asked for; losses after both."""
    from megatron_spear.policy import optimizer_state
    from megatron_spear.policy.parallel import initialize
    from megatron_spear.policy.policy import MegatronPolicy

    changes = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    section = PolicySection(distributed_optimizer=True, **changes)
    ctx = initialize(section, 0, timeout_s=60.0)
    packed = None
    if ctx.is_controller:
        packed = pack(*random_samples(), tokens_per_microbatch=200, data_parallel=ctx.data_size)

    def make() -> Any:
        path = folder / model
        return MegatronPolicy.from_hf(path, section, OptimizerSection(lr=1e-2), 9, ctx)

    def train(policy: Any) -> list[float]:
        return [policy.train_step(packed, WeightedNll())["loss/total"] for _ in range(2)]

    found: dict[str, Any] = {"stored": 0, "asked": 0}
    original = optimizer_state.sharded_state

    def watched(optimizer: Any, weights: Any, *, loading: bool) -> Any:
        state = original(optimizer, weights, loading=loading)
        parts = state.values() if 0 in state else [state]
        held = sum(_num_bytes(own) for own in parts if own["param_state"] is not None)
        found["asked" if loading else "stored"] = held / sum(
            parameter.numel() for parameter in policy._parameters()
        )
        return state

    optimizer_state.sharded_state = watched
    policy, other = make(), make()
    train(policy)
    policy.save(folder / f"{model} saved")
    found["expected"] = train(policy)
    other.load(folder / f"{model} saved")
    found["got"] = train(other)
    return found


def test_each_rank_has_its_share(tmp_path: Path) -> None:
    for model in ("Qwen3", "Qwen3Moe"):
        tiny_hf_folder(tmp_path / model, model)
        first, second = run_ranks(_save_and_load, 2, tmp_path, model, timeout_s=120)
        assert (first["stored"], second["stored"]) == (BYTES, 0)
        asked = first["asked"], second["asked"]
        assert max(asked) < 0.75 * BYTES, "some parameters have a piece on both ranks"
        assert BYTES <= sum(asked) < 1.5 * BYTES
        assert first["got"] == first["expected"] == second["got"]
