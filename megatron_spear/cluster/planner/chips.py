"""What one GPU of a node has and moves, by the vendor's figures, and a CPU rank's stand-in.

Rates are peaks, of dense matrices (vendors print twice as much, with 2:4 sparsity), and of one
direction (vendors add both up). Memory is the decimal figure of the data sheet; cards report a
little more or less. A GPU's network card is what DGX and HGX nodes give each GPU.

Sources, all NVIDIA's:

- a100: "A100 80GB" data sheet (SXM: 80 GB, 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s); DGX A100 data
  sheet (8 x 200 Gb/s, 2 TB of host memory); PCIe 4.0 x16.
- h100: "H100" data sheet (SXM: 80 GB, 989 and 1,979 TFLOPS, 3.35 TB/s, NVLink 900 GB/s); DGX H100
  data sheet (8 x 400 Gb/s, 2 TB); PCIe 5.0 x16.
- h200: "H200" data sheet (SXM: 141 GB, 4.8 TB/s, the rest as H100); DGX H200 data sheet.
- b200: DGX B200 data sheet (8 GPUs: 1,440 GB, 64 TB/s, FP8 72 PFLOPS sparse, NVLink 14.4 TB/s,
  8 x 400 Gb/s, 2 TB or more); Blackwell architecture brief (HGX B200: BF16 2.25 PFLOPS dense).
- gb200: GB200 NVL72 data sheet, a superchip of 2 GPUs halved (BF16 5 and FP8 10 PFLOPS dense,
  372 GB, 16 TB/s, NVLink 3.6 TB/s, NVLink-C2C 900 GB/s, 480 GB of LPDDR5X), ConnectX-7 400 Gb/s.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """One GPU with its share of the node; bytes, and a second's FLOPs and bytes one way."""

    name: str
    memory_bytes: int
    bf16_flops: float
    fp8_flops: float
    """As ``bf16_flops`` where the chip has no FP8."""
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    """To the other GPUs of the node."""
    nic_bytes_per_s: float
    """To other nodes."""
    pcie_bytes_per_s: float
    """To the host's memory."""
    host_bytes: int
    """The GPU's share of the host's memory."""


def _chip(
    name: str,
    gigabytes: float,
    teraflops: tuple[float, float],
    rates: tuple[float, float, float, float],
    host_gigabytes: int,
) -> Chip:
    """``teraflops`` in bf16 and FP8; ``rates`` in GB/s of HBM, NVLink, network card and PCIe."""
    hbm, nvlink, nic, pcie = (rate * 1e9 for rate in rates)
    return Chip(
        name=name,
        memory_bytes=round(gigabytes * 1e9),
        bf16_flops=teraflops[0] * 1e12,
        fp8_flops=teraflops[1] * 1e12,
        hbm_bytes_per_s=hbm,
        nvlink_bytes_per_s=nvlink,
        nic_bytes_per_s=nic,
        pcie_bytes_per_s=pcie,
        host_bytes=host_gigabytes * 10**9,
    )


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _chip("a100", 80, (312, 312), (2039, 300, 25, 31.5), 250),
        _chip("h100", 80, (989, 1979), (3350, 450, 50, 63), 250),
        _chip("h200", 141, (989, 1979), (4800, 450, 50, 63), 250),
        _chip("b200", 180, (2250, 4500), (8000, 900, 50, 63), 250),
        _chip("gb200", 186, (2500, 5000), (8000, 900, 50, 450), 240),
    )
}
"""By the names of ``cluster.chip``."""

CPU_FLOPS_PER_CORE = 5e10
"""Float32 FLOPs a second of a core in torch's matrix products: AVX2 at 2 to 3 GHz, of whose 64 to
96 GFLOPS a shared server core gives about half."""
CPU_MEMORY_BYTES_PER_S = 1e10
"""Memory bandwidth of a core."""
LOOPBACK_BYTES_PER_S = 1e9
"""What gloo moves between two processes of a machine."""


def cpu_rank(ranks: int) -> Chip:
    """What stands for a GPU where ``cluster.gpus_per_node`` is 0: a share of this machine.

    Args:
        ranks: trainer ranks that share the machine.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    cores = max((os.cpu_count() or 1) / ranks, 1.0)
    flops, rate = cores * CPU_FLOPS_PER_CORE, cores * CPU_MEMORY_BYTES_PER_S
    return Chip(
        name="cpu",
        memory_bytes=memory,
        bf16_flops=flops,
        fp8_flops=flops,
        hbm_bytes_per_s=rate,
        nvlink_bytes_per_s=LOOPBACK_BYTES_PER_S,
        nic_bytes_per_s=LOOPBACK_BYTES_PER_S,
        pcie_bytes_per_s=rate,
        host_bytes=memory,
    )
