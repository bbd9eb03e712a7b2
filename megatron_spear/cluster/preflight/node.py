"""What a node finds out about itself."""

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from megatron_spear.cluster.preflight.gpus import (
    SmiError,
    gpu_checks,
    read_gpus,
    run_smi,
    visible_gpus,
)
from megatron_spear.cluster.preflight.results import Check, NodeResult
from megatron_spear.config.cluster import ClusterSection

_SHM = Path("/dev/shm")
_PACKAGES = ("megatron-spear", "torch", "megatron-core", "transformers", "numpy")
_GIB = 1 << 30

T = TypeVar("T")


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where ``path`` is."""
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize


def package_versions() -> dict[str, str]:
    """Python and the packages that decide a result; ``-`` = not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Where a node's facts come from; a test has its own."""

    smi: Callable[[Sequence[str]], str] = run_smi
    visible: str | None = field(default_factory=visible_gpus)
    free_bytes: Callable[[Path], int] = free_bytes
    versions: Callable[[], dict[str, str]] = package_versions
    now: Callable[[], float] = time.time


def look_at_node(
    cluster: ClusterSection, run: Path, node: str, index: int, facts: Facts, limit_s: float
) -> NodeResult:
    """All checks that a node makes alone, side by side, within ``limit_s`` in total."""
    deadline = time.monotonic() + limit_s
    preflight = cluster.preflight
    rooms = [
        ("free /dev/shm", _SHM, preflight.min_shm_bytes),
        ("free disk of the run", run, preflight.min_disk_bytes),
    ]
    free = [begun(partial(facts.free_bytes, path)) for _, path, _ in rooms]
    versions = facts.versions()
    checks: list[Check] = []
    if cluster.gpus_per_node:
        asked = begun(lambda: read_gpus(facts.smi, facts.visible))
        try:
            gpus = asked(deadline)
            checks += gpu_checks(gpus, cluster)
            versions["GPU driver"] = ", ".join(dict.fromkeys(gpu.driver for gpu in gpus))
        except (SmiError, TimeoutError) as error:
            expected = f"{cluster.gpus_per_node} or more"
            checks.append(Check(name="GPUs", good=False, found=str(error), expected=expected))
    for (name, _, least), found in zip(rooms, free, strict=True):
        checks.append(_room(name, least, partial(found, deadline)))
    return NodeResult(node=node, index=index, checks=tuple(checks), versions=versions)


def _room(name: str, least: int, find: Callable[[], int]) -> Check:
    try:
        free = find()
        good, found = free >= least, f"{free / _GIB:.1f} GiB"
    except (OSError, TimeoutError) as error:
        good, found = False, str(error)
    return Check(name=name, good=good, found=found, expected=f"{least / _GIB:.1f} GiB or more")


def begun(function: Callable[[], T]) -> Callable[[float], T]:
    """Start ``function`` in a thread; what is returned waits for it until a deadline
    (``time.monotonic``) and gives or raises what it does.

    TimeoutError at the deadline, when the thread is left to itself: a call into a dead file system
    cannot be ended.
    """
    began, done = time.monotonic(), Future[T]()

    def run() -> None:
        try:
            done.set_result(function())
        except Exception as error:  # noqa: BLE001  (raised again where it is waited for)
            done.set_exception(error)

    def outcome(deadline: float) -> T:
        try:
            return done.result(max(deadline - time.monotonic(), 0.0))
        except TimeoutError:
            if done.done():
                raise
            waited_s = time.monotonic() - began
            raise TimeoutError(f"no answer within {waited_s:.1f} s") from None

    threading.Thread(target=run, name="preflight-check", daemon=True).start()
    return outcome
