"""The sizes of a training layout, without torch: planning needs none."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLayout:
    """Ranks of training: tensor parallel first, then context, data and pipeline parallel.

    Experts are whole, spread over the ranks of a stage, neighbours first.
    """

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.stage_size * self.pipeline
