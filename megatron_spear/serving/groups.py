"""Process groups with a trainer: joining, receiving, leaving; each in a thread with a deadline."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.background import abandonable
from megatron_spear.errors import EngineError
from megatron_spear.serving.payloads import NamedTensors, sizes_of, slice_of

T = TypeVar("T")


async def in_thread(function: Callable[[], T], name: str) -> T:
    """What ``function`` gives, worked out beside the event loop.

    The thread does not keep the process from ending, as one that waits for a dead trainer would.
    """
    return await asyncio.wrap_future(abandonable(function, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """A group that was joined; after a failed receive it is ``broken``: the ranks no longer agree
    on what comes next."""

    group: dist.ProcessGroup | None
    broken: str | None = None


class UpdateGroups:
    """The groups this server has joined, by name."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._members: dict[str, _Member] = {}

    async def join(
        self, *, host: str, port: int, rank: int, world_size: int, name: str, backend: str
    ) -> None:
        """Join a group whose rank 0 listens at ``host:port``; EngineError if it does not come
        about in time, or this name is taken."""
        if name in self._members:
            raise EngineError(f"the group {name!r} exists; destroy it first or choose another name")
        self._members[name] = _Member(group=None)
        try:
            group = await in_thread(
                lambda: peer_groups.join(
                    backend=backend,
                    host=host,
                    port=port,
                    rank=rank,
                    world_size=world_size,
                    name=name,
                    timeout_s=self._timeout_s,
                ),
                f"join {name}",
            )
        except (RuntimeError, ValueError, OSError) as error:
            del self._members[name]
            raise EngineError(str(error)) from None
        self._members[name] = _Member(group=group)

    async def leave(self, name: str) -> None:
        """Leave a group; EngineError if there is none."""
        member = self._members.get(name)
        if member is None:
            raise EngineError("The group to be destroyed does not exist.")
        if member.group is None:
            raise EngineError(f"the group {name!r} is still being joined")
        del self._members[name]
        await in_thread(lambda: peer_groups.leave(member.group), f"leave {name}")

    async def receive(
        self,
        name: str,
        names: Sequence[str],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[Sequence[int]],
        *,
        flattened: bool,
    ) -> NamedTensors:
        """Tensors that rank 0 broadcasts: one after the other, or all as one run of bytes."""
        member = self._members.get(name)
        if member is None or member.group is None:
            raise EngineError(
                f"Group {name} not in {list(self._members)}. "
                "Please call `init_weights_update_group` first."
            )
        if member.broken is not None:
            raise EngineError(f"the group {name!r} is broken ({member.broken}); destroy it")
        group = member.group
        try:
            if flattened:
                return await in_thread(lambda: _flattened(group, names, dtypes, shapes), "receive")
            return await in_thread(lambda: _separate(group, names, dtypes, shapes), "receive")
        except RuntimeError as error:
            if not isinstance(error, EngineError):
                self._members[name] = _Member(group=group, broken=str(error))
            raise


def _separate(
    group: dist.ProcessGroup,
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[Sequence[int]],
) -> NamedTensors:
    tensors = [
        torch.empty(torch.Size(shape), dtype=dtype)
        for dtype, shape in zip(dtypes, shapes, strict=True)
    ]
    # As bytes: gloo does not know every dtype.
    waits = [
        dist.broadcast(tensor.flatten().view(torch.uint8), src=0, group=group, async_op=True)
        for tensor in tensors
    ]
    for wait in waits:
        wait.wait()
    return list(zip(names, tensors, strict=True))


def _flattened(
    group: dist.ProcessGroup,
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[Sequence[int]],
) -> NamedTensors:
    sizes = sizes_of(dtypes, shapes)
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(flat, src=0, group=group)
    tensors, start = [], 0
    for name, dtype, shape, size in zip(names, dtypes, shapes, sizes, strict=True):
        tensors.append((name, slice_of(flat, name, dtype, shape, start, start + size)))
        start += size
    return tensors
