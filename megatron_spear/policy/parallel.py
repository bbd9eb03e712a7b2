"""Process groups and layouts: who holds which part of the model, checked before anything starts."""

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_spear.config.layout import layout_problems
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.layout_fit import model_problems
from megatron_spear.conversion.shape import model_shape
from megatron_spear.errors import ConfigError
from megatron_spear.policy import cpu

logger = logging.getLogger(__name__)

_control: dist.ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A rank's coordinates in a layout; whether such a rank runs does not matter."""

    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    expert_rank: int = 0
    expert_size: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelContext:
    """This process's place in the layout.

    Ranks are ordered tensor parallel first, then context, data and pipeline parallel. Experts are
    spread over the first three together, neighbours first. ``control`` is a gloo group of all ranks
    for Python objects; ``tensor`` the tensor-parallel group, ``context`` the context-parallel one.
    ``seed`` is what the generators were seeded with.

    Example: of 4 ranks with tensor parallel 2 and expert parallel 2, the experts' first half is on
    ranks 0 and 2, the second on 1 and 3.
    """

    seed: int
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    context_rank: int
    context_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    device: torch.device
    control: dist.ProcessGroup
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup

    @property
    def is_controller(self) -> bool:
        """True on global rank 0, which owns rollouts, replay and hooks."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the logits are."""
        return self.pipeline_rank == self.pipeline_size - 1

    def data_rank_of(self, rank: int) -> int:
        """The data-parallel rank of another global rank."""
        return rank // (self.tensor_size * self.context_size) % self.data_size

    @property
    def speaks_for_its_tokens(self) -> bool:
        """True on the one rank of those with the same tokens that reports their results."""
        return self.is_last_stage and self.tensor_rank == 0


def initialize(policy: PolicySection, seed: int, timeout_s: float = 600.0) -> ParallelContext:
    """Start torch.distributed and Megatron's groups; the layout is taken from ``policy``.

    Under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) all its ranks join; otherwise the
    world is this process. Collectives that wait longer than ``timeout_s`` seconds fail. Raises
    ConfigError if the layout does not fit the world size.
    """
    from megatron.core import parallel_state

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _refuse(layout_problems(policy, world_size))
    timeout = timedelta(seconds=timeout_s)
    device = _device()
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        if world_size == 1:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            _meet(backend, timeout)
    cpu.patch_megatron()
    parallel_state.initialize_model_parallel(
        policy.tensor_parallel,
        policy.pipeline_parallel,
        policy.virtual_pipeline if policy.virtual_pipeline > 1 else None,
        context_parallel_size=policy.context_parallel,
        expert_model_parallel_size=policy.expert_parallel,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
        create_gloo_process_groups=device.type == "cpu",
    )
    seed_generators(seed)
    ctx = ParallelContext(
        seed=seed,
        rank=dist.get_rank(),
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=policy.tensor_parallel,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=policy.context_parallel,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=policy.pipeline_parallel,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=policy.expert_parallel,
        device=device,
        control=dist.new_group(backend="gloo", timeout=timeout),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
    )
    global _control
    _control = ctx.control
    context_rank = ctx.rank // ctx.tensor_size % ctx.context_size
    places = (context_rank, ctx.data_rank_of(ctx.rank), ctx.rank % ctx.expert_size)
    found = (ctx.context_rank, ctx.data_rank, ctx.expert_rank)
    assert places == found, "Megatron's rank order has changed"
    return ctx


def control_group() -> dist.ProcessGroup | None:
    """``ParallelContext.control`` for those without a context; None where ``initialize`` was not
    called, which is the default group."""
    return _control


def _meet(backend: str, timeout: timedelta) -> None:
    """The group of all ranks; ConfigError where rank 0 cannot listen for the others."""
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        raise ConfigError(
            f"the ranks cannot meet at MASTER_ADDR={address}, MASTER_PORT={port}: "
            f"{str(error).splitlines()[0]}; choose another port, or end the process that has it"
        ) from error


def seed_generators(seed: int) -> None:
    """Seed this rank's generators; Megatron adds the rank where ranks have to differ."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def destroy(keep_world: bool = False) -> None:
    """Leave all process groups; harmless when there are none.

    With ``keep_world`` the ranks stay connected and ``initialize`` may be called with another
    layout.
    """
    from megatron.core import parallel_state

    global _control
    _control = None
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    if not keep_world:
        dist.destroy_process_group()
        return
    # Megatron only forgets its groups; gloo's keep a thread each
    for group in [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def check_layout(policy: PolicySection, hf_config: Any, world_size: int) -> None:
    """ConfigError unless the model can be cut as ``policy`` says; pure, nothing is started.

    All problems are reported at once.
    """
    _refuse(model_problems(policy, model_shape(hf_config), world_size))


def _refuse(problems: Iterable[str]) -> None:
    """ConfigError with all the problems, if there are any."""
    if found := list(problems):
        raise ConfigError("this layout cannot work:\n" + "\n".join(f"  {p}" for p in found))


def _device() -> torch.device:
    if cpu.active():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
