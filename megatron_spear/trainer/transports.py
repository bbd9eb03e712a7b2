"""The transport a run's settings ask for: how the policy's weights get into its engine."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_spear.config.rollout import RolloutSection, WeightSyncSection
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.trainer.engines import MadeEngine
from megatron_spear.weight_sync.broadcast import Broadcast
from megatron_spear.weight_sync.disk import Disk
from megatron_spear.weight_sync.in_process import InProcess
from megatron_spear.weight_sync.ipc import Ipc
from megatron_spear.weight_sync.layouts import layout_of
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.sharded.transport import Sharded
from megatron_spear.weight_sync.transport import Transport
from megatron_spear.weight_sync.update import Delivery, ServerTransport

_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def make_transport(
    rollout: RolloutSection,
    section: WeightSyncSection,
    policy: MegatronPolicy,
    made: tuple[EventLoop, MadeEngine] | None,
    *,
    virtual_pipeline: int,
    model: Path,
    folder: Path,
) -> Transport:
    """The transport, on every rank; ``made`` is None on ranks other than the controller.

    ``model`` is the Hugging Face folder that the policy began with, ``folder`` where ``disk``
    writes unless the settings name another.
    """
    if rollout.engine == "embedded":
        return _in_process(rollout, policy, made)
    servers = made[1].updates if made is not None else None
    host = section.host or _own_address(rollout.servers)
    if section.transport == "sharded":
        return Sharded(
            source=policy,
            ranks=policy.ctx,
            servers=servers,
            model=policy.shape,
            training=layout_of(policy.ctx, virtual=virtual_pipeline),
            host=host,
            bucket_bytes=section.bucket_bytes,
            precision=section.precision,
            deadline_s=section.deadline_s,
            expert=section.engine_expert_parallel,
        )
    return ServerTransport(
        source=policy,
        manifest=Manifest.of_model(policy.shape, section.precision),
        servers=servers,
        delivery=_delivery(section, policy, host, model, folder) if servers is not None else None,
        control=_control(policy),
        deadline_s=section.deadline_s,
    )


def _in_process(
    rollout: RolloutSection, policy: MegatronPolicy, made: tuple[EventLoop, MadeEngine] | None
) -> InProcess:
    if made is None:
        return InProcess(source=policy, receiver=None, control=_control(policy))
    loop, engine = made[0], made[1].engine
    assert isinstance(engine, EmbeddedEngine), "it takes weights itself"
    return InProcess(
        source=policy,
        receiver=engine,
        control=_control(policy),
        pause=lambda: loop.run(engine.pause(rollout.pause_mode)),
        resume=lambda: loop.run(engine.resume()),
    )


def _control(policy: MegatronPolicy) -> dist.ProcessGroup | None:
    """The gloo group of all training ranks, where there are several."""
    return policy.ctx.control if policy.ctx.world_size > 1 else None


def _delivery(
    section: WeightSyncSection, policy: MegatronPolicy, host: str, model: Path, folder: Path
) -> Delivery:
    device = policy.ctx.device
    if section.transport == "disk":
        return Disk(folder=section.folder or folder, model=model, precision=section.precision)
    if section.transport == "ipc":
        return Ipc(bucket_bytes=section.bucket_bytes, device=device)
    backend: Literal["gloo", "nccl"] = "nccl" if device.type == "cuda" else "gloo"
    return Broadcast(
        host=host,
        backend=backend,
        bucket_bytes=section.bucket_bytes,
        deadline_s=section.deadline_s,
        device=device,
    )


def _own_address(servers: Sequence[str]) -> str:
    """Where servers find this machine: the loopback address if all of them are on it too."""
    local = all(urlsplit(url).hostname in _THIS_MACHINE for url in servers)
    return "127.0.0.1" if local else socket.getfqdn()
