"""The GPUs a run has and how fast they compute, read and exchange."""

from dataclasses import dataclass

from megatron_spear.cluster.planner.chips import Chip
from megatron_spear.cluster.planner.efficiency import CONSTANTS, Constants
from megatron_spear.cluster.planner.job import Job
from megatron_spear.conversion.training_layout import TrainingLayout

Ranks = TrainingLayout
"""What the planner calls the ranks that train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """GPUs and how they are tied together."""

    chip: Chip
    gpus_per_node: int
    constants: Constants = CONSTANTS

    def rate(self, ranks: int, stride: int = 1) -> float:
        """Bytes a second of a collective over ``ranks`` that are ``stride`` apart, per rank.

        Between nodes all adapters of a node's members carry it, each byte once.
        """
        inside = self.chip.nvlink_bytes_per_s * self.constants.inside_node
        if ranks * stride <= self.gpus_per_node:
            return inside
        members = max(1, self.gpus_per_node // stride)
        between = self.chip.nic_bytes_per_s * self.constants.between_nodes
        return min(inside, members * between)

    def latency_s(self, ranks: int, stride: int = 1) -> float:
        """A collective of few bytes."""
        far = ranks * stride > self.gpus_per_node
        return self.constants.far_collective_s if far else self.constants.collective_s

    def gather_s(self, part_bytes: float, ranks: int, stride: int = 1) -> float:
        """All-gather or reduce-scatter, each rank with a part of so many bytes."""
        if ranks <= 1:
            return 0.0
        whole = part_bytes * (ranks - 1)
        return self.latency_s(ranks, stride) + whole / self.rate(ranks, stride)

    def all_to_all_s(self, sent_bytes: float, ranks: int) -> float:
        """All-to-all of neighbours, each sending so many bytes to all together, itself included;
        within nodes and between them at once."""
        if ranks <= 1:
            return 0.0
        near = min(ranks, self.gpus_per_node)
        inside = self.chip.nvlink_bytes_per_s * self.constants.inside_node
        between = self.chip.nic_bytes_per_s * self.constants.between_nodes
        far = 1 - near / ranks
        slowest = max((near - 1) / ranks / inside, far / between)
        return self.latency_s(ranks) + sent_bytes * slowest

    def memory_s(self, num_bytes: float) -> float:
        """Reading or writing so many bytes of GPU memory."""
        return num_bytes / (self.chip.hbm_bytes_per_s * self.constants.memory)

    def product_s(self, rows: float, inner: float, columns: float, *, fp8: bool = False) -> float:
        """A matrix product ``rows x inner x columns``."""
        peak = self.chip.fp8_flops if fp8 and self.chip.fp8_flops else self.chip.bf16_flops
        share = self.constants.of_matmul(rows, inner, columns)
        return 2 * rows * inner * columns / (peak * share)


def machines_of(job: Job) -> Machines:
    """The job's; CPU ranks are taken for GPUs of one node."""
    ranks = max(job.trainer_gpus, job.engine_gpus)
    return Machines(chip=job.chip, gpus_per_node=job.gpus_per_node or ranks)


def ranks_of(job: Job) -> Ranks:
    """The job's training layout."""
    policy = job.policy
    return Ranks(
        tensor=policy.tensor_parallel,
        context=policy.context_parallel,
        data=job.data_parallel,
        pipeline=policy.pipeline_parallel,
        virtual=policy.virtual_pipeline,
        expert=policy.expert_parallel,
    )
