"""Writes what the trajectories of each step were (``tracking.recorded``); never gets in the way.

| point | what it takes |
|---|---|
| ``on_played`` | all that was played, failures too |
| ``on_scored`` | the groups that hooks left, with the rewards they gave, a round at a time |
| ``on_samples`` | advantages, old_logprobs |
| ``on_step_end`` | what replay gave and took; here the step's file is written |

It looks on only: it is called last, after replay, and is in no checkpoint. A file that cannot be
written, on a full disk say, costs that step's record and one warning.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_spear.config.method import AlgorithmSection
from megatron_spear.replay.released import ReplaySource
from megatron_spear.rollout.token_texts import TokenTexts
from megatron_spear.tracking.recorded import RecordedStep
from megatron_spear.tracking.recorded_files import write_step
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.step_records import StepRecords, replayed_record
from megatron_spear.types import (
    ScoredGroup,
    StepContext,
    StepReport,
    TrainSample,
    TrajectoryGroup,
)

log = logging.getLogger(__name__)


class RecordingHook(Hook):
    """Records the first ``num_groups`` groups of each step, in the order of the prompts (which are
    drawn, so they are any groups), and all replayed rows, into ``folder``.

    ``replay`` is the hook that replays, if there is one.
    """

    keeps_state = False

    def __init__(
        self,
        folder: Path,
        num_groups: int,
        *,
        algorithm: AlgorithmSection,
        group_size: int,
        texts: TokenTexts,
        replay: ReplaySource | None = None,
    ) -> None:
        self._folder, self._num_groups = folder, num_groups
        self._algorithm, self._group_size = algorithm, group_size
        self._texts, self._replay = texts, replay
        self._has_warned = False
        self._played: tuple[TrajectoryGroup, ...] = ()
        self._scored: tuple[ScoredGroup, ...] = ()
        self._last_round: tuple[ScoredGroup, ...] = ()
        self._samples: Sequence[TrainSample] = ()

    def on_played(self, ctx: StepContext, groups: tuple[TrajectoryGroup, ...]) -> None:
        """Remember what was played."""
        self._played += groups

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        """Remember the rewards."""
        self._scored += groups
        self._last_round = groups
        return groups

    def on_samples(self, ctx: StepContext, samples: Sequence[TrainSample]) -> None:
        """Remember what is trained on."""
        self._samples = samples

    def on_step_end(self, ctx: StepContext, report: StepReport) -> None:
        """Write the step's file."""
        try:
            write_step(self._folder, self._recorded(ctx))
        except Exception as error:  # noqa: BLE001  a record must never end a run
            if not self._has_warned:
                log.warning(
                    "the trajectories of step %d could not be recorded, and the run goes on "
                    "(further ones are told of no more): %s: %s",
                    ctx.step,
                    type(error).__name__,
                    error,
                )
            self._has_warned = True
        self._played, self._scored, self._last_round, self._samples = (), (), (), ()

    def _recorded(self, ctx: StepContext) -> RecordedStep:
        chosen = self._played[: self._num_groups]
        names = {group.group_id for group in chosen}
        replay = self._replay
        records = StepRecords(
            ctx=ctx,
            algorithm=self._algorithm,
            group_size=self._group_size,
            texts=self._texts,
            scored={group.group_id: group for group in self._scored if group.group_id in names},
            samples={
                (sample.trajectory_id, sample.segment): sample
                for sample in self._samples
                if sample.trajectory_id.group in names
            },
            last_round=frozenset(group.group_id for group in self._last_round),
            stored=replay.entered if replay is not None else frozenset(),
        )
        return RecordedStep(
            step=ctx.step,
            policy_version=ctx.policy_version,
            intrinsic_weight=ctx.coefficients.intrinsic_weight,
            replay_weight=ctx.coefficients.replay_weight,
            num_groups=len(self._played),
            num_trajectories=sum(len(g.members) + len(g.failures) for g in self._played),
            trajectories=tuple(record for group in chosen for record in records.group(group)),
            replayed=tuple(
                replayed_record(ctx, row) for row in (replay.released if replay is not None else ())
            ),
        )
