"""The points of a trainer step where something may be added; a hook holds no trainer.

| call | when | gives |
|---|---|---|
| ``on_played`` | trajectories are there, before rewards | nothing |
| ``on_scored`` | rewards are known, before filters and advantages | the groups to go on with |
| ``on_samples`` | this step's samples are final (advantages, old_logprobs) | nothing |
| ``extra_updates`` | before the optimizer step | updates that join it |
| ``metrics`` | before the step's report is made | numbers for the report |
| ``on_step_end`` | weights are published, the report is made | nothing |

Hooks live on rank 0 and are called in their order of registration, by ``hooks.calls``, which says
whose fault it was when one raises or gives something else. Each point comes once a step, but
``on_played`` and then ``on_scored`` once a round where ``algorithm.dynamic_sampling_rounds`` plays
several: each group is shown once, whether it is replaced later or not. ``state_dict`` is asked for
between steps only. Users switch on their own with ``hooks:`` in the settings (docs/hooks.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron_spear.config.base import Section
from megatron_spear.replay.state import require_keys
from megatron_spear.types import (
    ScoredGroup,
    StepContext,
    StepReport,
    TrainSample,
    TrajectoryGroup,
    Update,
)


class Hook:
    """Does nothing at every point; override what is needed.

    A user's hook that has settings declares them as its own ``Settings`` and is made as
    ``MyHook(settings)``; one that has none is made as ``MyHook()``.
    """

    class Settings(Section):
        """No settings; a hook that has some derives its ``Settings`` from this."""

    keeps_state: ClassVar[bool] = True
    """False for one that looks on only: it is in no checkpoint, so that a resumed run may have it
    or not."""

    def on_played(self, ctx: StepContext, groups: tuple[TrajectoryGroup, ...]) -> None:
        """All that was played for the step, or in this round of it: failures too."""

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        """The same groups, scored; returns those to go on with. Groups whose rewards are then equal
        are what dynamic sampling replaces."""
        return groups

    def on_samples(self, ctx: StepContext, samples: Sequence[TrainSample]) -> None:
        """The step's samples with their final advantages and old_logprobs."""

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        """Updates that enter this step's optimizer step besides the on-policy one."""
        return []

    def metrics(self) -> dict[str, float]:
        """What to report of the current step; names start with a prefix of the hook's own, which
        no other part of the run has: ``rare_types/bonus``."""
        return {}

    def on_step_end(self, ctx: StepContext, report: StepReport) -> None:
        """The step is done; ``report.policy_version`` counts the new weights."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the hook needs to go on as if never stopped, as plain JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; CheckpointError on missing or unknown keys."""
        require_keys(state, (), type(self).__name__)

    def prune(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Free what neither one of the ``kept`` states (those of the checkpoints on disk) nor the
        present one needs any more; ``checkpoint.async_save`` calls it some steps after the save."""
