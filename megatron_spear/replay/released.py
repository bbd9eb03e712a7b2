"""What replay gave to a step, row by row, for those who look on."""

from dataclasses import dataclass
from typing import Protocol

from megatron_spear.types import TrainSample, TrajectoryId


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedRow:
    """One row that left the store to be trained on: its segments as they were ``stored`` (with the
    advantages of collection), and what it was compared with now.

    ``advantage`` is the one that it is trained with (the mean over its tokens where they differ),
    ``baseline`` what ``reward`` (shaped, as compared) was compared with, None where the stored
    advantages were kept or scaled; ``weight`` is gamma(t).
    """

    stored: tuple[TrainSample, ...]
    advantage: float
    baseline: float | None
    reward: float
    weight: float


class ReplaySource(Protocol):
    """A hook that replays, asked after its ``on_step_end``."""

    @property
    def released(self) -> tuple[ReleasedRow, ...]:
        """The rows it gave to the step."""
        ...

    @property
    def entered(self) -> frozenset[TrajectoryId]:
        """The trajectories of the step that entered the store."""
        ...
