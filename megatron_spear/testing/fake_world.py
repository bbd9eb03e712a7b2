"""One rank of a world that is not there: to build what a rank of hundreds would hold.

Process groups have their true sizes and members, and their collectives do nothing. On torch's meta
device a model of any size is built in a second and no memory.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_spear.config.schema import PolicySection
from megatron_spear.policy import parallel
from megatron_spear.policy.cpu import CudaMeansCpu


@contextlib.contextmanager
def fake_rank(
    policy: PolicySection, rank: int, world_size: int
) -> Iterator[parallel.ParallelContext]:
    """This process as ``rank`` of ``world_size``, set up by the policy's own ``initialize``.

    What is built in the block lies on torch's meta device, which is the context's. The process must
    be in no world yet; use ``run_ranks(function, 1)`` for one of its own.
    """
    make_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return make_group(*args, **kwargs | {"backend": "fake"})

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": str(world_size)}),
            patch.object(dist, "new_group", fake_group),  # gloo's would look for the others
        ):
            ctx = parallel.initialize(policy, seed=0)
        meta = torch.device("meta")
        with CudaMeansCpu(), meta:  # Megatron moves some weights to CUDA, from meta in vain
            yield dataclasses.replace(ctx, device=meta)
    finally:
        parallel.destroy()
