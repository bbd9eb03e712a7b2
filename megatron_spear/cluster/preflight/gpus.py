"""The GPUs of a node, from ``nvidia-smi``: number, free memory, memory errors, other processes.

Its queries print one line a GPU (or process), values apart by commas; memory is in MiB. What a GPU
does not have is ``[N/A]`` (older drivers: ``[Not Supported]``); ``nvidia-smi --help-query-gpu``,
``--help-query-remapped-rows`` and ``--help-query-compute-apps`` list the fields.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_spear.cluster.preflight.results import Check
from megatron_spear.config.cluster import ClusterSection

SMI_DEADLINE_S = 30.0
_MIB = 1 << 20
_GPU_FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.free",
    "ecc.errors.uncorrected.volatile.total",
)
_ROW_FIELDS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
_APP_FIELDS = ("gpu_uuid", "pid", "process_name")
_NONE = ("[N/A]", "N/A", "[Not Supported]")
_NO = ("0", "No", *_NONE)

Smi = Callable[[Sequence[str]], str]
"""``nvidia-smi`` with these arguments gives what it prints; raises ``SmiError``."""


class SmiError(Exception):
    """``nvidia-smi`` is missing, fails, hangs or prints what cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU. ``ecc_errors``: uncorrected ones since the driver was loaded, None without ECC.
    ``rows``: what is wrong with its remapped rows, empty if nothing. ``processes``: ``name (pid)``.
    """

    index: int
    uuid: str
    name: str
    driver: str
    total_bytes: int
    free_bytes: int
    ecc_errors: int | None
    rows: str
    processes: tuple[str, ...]


def run_smi(arguments: Sequence[str]) -> str:
    """The real ``nvidia-smi``."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            timeout=SMI_DEADLINE_S,
            check=False,
        )
    except FileNotFoundError:
        raise SmiError("nvidia-smi is not on this node") from None
    except OSError as error:
        raise SmiError(f"nvidia-smi cannot be run: {error}") from None
    except subprocess.TimeoutExpired:
        raise SmiError(f"nvidia-smi did not answer within {SMI_DEADLINE_S:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip() or "nothing"
        raise SmiError(f"nvidia-smi ended with status {done.returncode} and said: {said:.200}")
    return done.stdout


def read_gpus(smi: Smi, visible: str | None = None) -> list[Gpu]:
    """The GPUs of this node, or those that ``visible`` (``CUDA_VISIBLE_DEVICES``) names.

    Raises SmiError.
    """
    lines = list(_query(smi, "gpu", _GPU_FIELDS))
    rows = {uuid: _row_problem(*rest) for uuid, *rest in _query(smi, "remapped-rows", _ROW_FIELDS)}
    apps: dict[str, list[str]] = {}
    for uuid, pid, name in _query(smi, "compute-apps", _APP_FIELDS):
        apps.setdefault(uuid, []).append(f"{name} ({pid})")
    found = [
        Gpu(
            index=_number(index),
            uuid=uuid,
            name=name,
            driver=driver,
            total_bytes=_number(total) * _MIB,
            free_bytes=_number(free) * _MIB,
            ecc_errors=None if ecc in _NONE else _number(ecc),
            rows=rows.get(uuid, ""),
            processes=tuple(apps.get(uuid, ())),
        )
        for index, uuid, name, driver, total, free, ecc in lines
    ]
    if visible is None:
        return found
    names = [name for name in visible.split(",") if name]
    return [g for g in found if any(n == str(g.index) or g.uuid.startswith(n) for n in names)]


def gpu_checks(gpus: Sequence[Gpu], cluster: ClusterSection) -> list[Check]:
    """Number, free memory, errors and other processes; of several GPUs the worst is told."""
    kinds = ", ".join(dict.fromkeys(gpu.name for gpu in gpus))
    least = cluster.preflight.min_free_gpu_fraction
    shares = [(gpu.free_bytes / gpu.total_bytes, gpu.index) for gpu in gpus]
    full = [f"GPU {index}: {share:.0%}" for share, index in shares if share < least]
    broken = [problem for gpu in gpus for problem in _memory_problems(gpu)]
    busy = [f"GPU {gpu.index}: {', '.join(gpu.processes)}" for gpu in gpus if gpu.processes]
    good_memory = f"{min(shares)[0]:.0%}" if shares else "-"
    return [
        Check(
            name="GPUs",
            good=len(gpus) >= cluster.gpus_per_node,
            found=f"{len(gpus)} {kinds}".strip(),
            expected=f"{cluster.gpus_per_node} or more",
        ),
        Check(
            name="free GPU memory",
            good=not full,
            found="; ".join(full) or good_memory,
            expected=f"{least:.0%} or more",
        ),
        Check(
            name="GPU memory errors",
            good=not broken,
            found="; ".join(broken) or "none",
            expected="none",
        ),
        Check(
            name="processes on GPUs",
            good=not busy,
            found="; ".join(busy) or "none",
            expected="none",
        ),
    ]


def visible_gpus() -> str | None:
    """``CUDA_VISIBLE_DEVICES`` of this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _memory_problems(gpu: Gpu) -> Iterator[str]:
    if gpu.ecc_errors:
        yield f"GPU {gpu.index}: {gpu.ecc_errors} uncorrected ECC errors"
    if gpu.rows:
        yield f"GPU {gpu.index}: {gpu.rows}"


def _row_problem(pending: str, failure: str) -> str:
    if failure not in _NO:
        return f"row remapping failed ({failure})"
    return "" if pending in _NO else f"row remapping pending ({pending})"


def _query(smi: Smi, what: str, fields: Sequence[str]) -> Iterator[list[str]]:
    """The values of each line that a query prints."""
    text = smi([f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"])
    for line in filter(str.strip, text.splitlines()):
        values = [value.strip() for value in line.split(",", len(fields) - 1)]
        if len(values) != len(fields):
            raise SmiError(f"nvidia-smi printed {line!r:.100}, expected {', '.join(fields)}")
        yield values


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SmiError(f"nvidia-smi printed {text!r:.60}, expected a number") from None
