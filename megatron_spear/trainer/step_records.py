"""From a step's groups and samples to the records of ``tracking.recorded``."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.advantages import shaped_rewards
from megatron_spear.algorithms.filters import reward_spread
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.replay.released import ReleasedRow
from megatron_spear.rewards.row_marks import row_marks
from megatron_spear.rollout.rollouter import collected_in
from megatron_spear.rollout.token_texts import TokenTexts
from megatron_spear.tracking.recorded import (
    Numbers,
    RecordedReplay,
    RecordedReward,
    RecordedTrajectory,
    RecordedTurn,
)
from megatron_spear.trainer.marking import counted, filters_in_force
from megatron_spear.types import (
    Reward,
    RowKey,
    ScoredGroup,
    StepContext,
    TrainSample,
    Trajectory,
    TrajectoryGroup,
    TrajectoryId,
    Turn,
)

# Digits behind the point that are kept; advantages may be small where rewards are.
_LOGPROB_DIGITS = 4
_DIGITS = 6
_MANY = 64
"""Numbers from which on numpy is the quicker way."""


@dataclass(frozen=True, kw_only=True)
class StepRecords:
    """Makes the records of one step.

    ``scored`` are the groups that hooks left, by id, ``last_round`` the ids of those of the last
    round of dynamic sampling, which replaces no more; ``samples`` what was trained on, by row;
    ``stored`` the trajectories that entered replay. The row filters' marks are found again here, of
    the recorded trajectories alone.
    """

    ctx: StepContext
    algorithm: AlgorithmSection
    group_size: int
    texts: TokenTexts
    scored: Mapping[str, ScoredGroup]
    samples: Mapping[RowKey, TrainSample]
    last_round: frozenset[str]
    stored: frozenset[TrajectoryId] = field(default_factory=frozenset)

    def group(self, played: TrajectoryGroup) -> list[RecordedTrajectory]:
        """The trajectories of a group, failed ones too, by member."""
        everyone = sorted((*played.members, *played.failures), key=lambda t: t.id.member)
        marks = {t.id: self._marks(t) for t in everyone}
        scored = self.scored.get(played.group_id)
        counting = self._counting(scored, marks) if scored else None
        weight = self.ctx.coefficients.intrinsic_weight
        mean = float(shaped_rewards(counting, weight).mean()) if counting else None
        left_out = self._left_out(played, scored, counting)
        rewards = {m.trajectory.id: m.reward for m in scored.members} if scored else {}
        return [
            self._trajectory(t, rewards.get(t.id), mean, left_out, marks[t.id]) for t in everyone
        ]

    def _marks(self, trajectory: Trajectory) -> tuple[tuple[str, ...], ...]:
        section = filters_in_force(self.algorithm)
        return tuple(
            tuple(name for name, on in asdict(row_marks(trajectory, s, section)).items() if on)
            for s in trajectory.segments
        )

    def _counting(
        self, scored: ScoredGroup, marks: Mapping[TrajectoryId, tuple[tuple[str, ...], ...]]
    ) -> ScoredGroup | None:
        """The group with the members that count in its statistics; None where none does."""
        marked = frozenset(
            (id, index) for id, rows in marks.items() for index, row in enumerate(rows) if row
        )
        (group,) = counted([scored], marked, self.algorithm)
        return group if group.members else None

    def _left_out(
        self,
        played: TrajectoryGroup,
        scored: ScoredGroup | None,
        counting: ScoredGroup | None,
    ) -> str:
        """Why the group taught nothing; "" where it did."""
        if not played.members:
            return "all_failed"
        if scored is None:
            return "replaced"
        if any(s.trajectory_id.group == played.group_id for s in self._with_advantage()):
            return ""
        blocks = self.algorithm.compat == "official" and self.algorithm.official.tree == "math"
        if blocks and len(scored.members) != self.group_size:
            return "incomplete"
        if counting and reward_spread(counting, self.ctx.coefficients.intrinsic_weight):
            return "small_spread"
        if played.group_id not in self.last_round:
            return "replaced"
        return "equal_rewards" if counting else "all_marked"

    def _with_advantage(self) -> Iterable[TrainSample]:
        return (sample for sample in self.samples.values() if sample.advantages.any())

    def _trajectory(
        self,
        trajectory: Trajectory,
        reward: Reward | None,
        group_mean: float | None,
        left_out: str,
        marks: tuple[tuple[str, ...], ...],
    ) -> RecordedTrajectory:
        turns: list[RecordedTurn] = []
        trained, prompt = False, trajectory.prompt
        for index, segment in enumerate(trajectory.segments):
            sample = self.samples.get((trajectory.id, index))
            if sample is not None and not sample.response_mask.any():
                sample = None  # marked: a context, and nothing to learn
            trained = trained or sample is not None
            starts = segment.turn_starts.tolist()
            turns += [
                self._turn(index, turn, sample, start)
                for turn, start in zip(segment.turns, starts, strict=True)
            ]
        return RecordedTrajectory(
            group=trajectory.id.group,
            member=trajectory.id.member,
            prompt_id=prompt.prompt_id,
            kind=prompt.kind,
            env=prompt.env,
            status=trajectory.status.value,
            won=trajectory.won,
            env_reward=_number(trajectory.env_reward),
            reward=_reward(reward, self.ctx.coefficients.intrinsic_weight) if reward else None,
            group_mean=_number(group_mean),
            left_out=left_out,
            segment_marks=marks,
            trained=trained,
            stored=trajectory.id in self.stored,
            error=str(trajectory.info.get("error", "")) if trajectory.status.failed else "",
            prompt=self._first_prompt(trajectory),
            turns=tuple(turns),
        )

    def _first_prompt(self, trajectory: Trajectory) -> str:
        if not trajectory.turns:
            return ""
        return self.texts.whole(trajectory.turns[0].observation_tokens)

    def _turn(
        self, segment: int, turn: Turn, sample: TrainSample | None, start: int
    ) -> RecordedTurn:
        text, tokens = self.texts.of(turn.action_tokens)
        own = slice(start, start + len(turn.action_tokens))
        return RecordedTurn(
            segment=segment,
            observation=turn.observation,
            num_observation_tokens=len(turn.observation_tokens),
            text=text,
            action=turn.action_text,
            tokens=tokens,
            rollout_logprobs=_numbers(turn.action_logprobs, _LOGPROB_DIGITS),
            old_logprobs=_numbers(sample.old_logprobs[own], _LOGPROB_DIGITS) if sample else None,
            advantages=_numbers(sample.advantages[own], _DIGITS) if sample else None,
            versions=turn.versions,
            tool_calls=turn.tool_calls,
            finish_reason=turn.finish_reason,
            time_s=round(turn.time_s, 3),
            valid=turn.valid,
            void=turn.void,
        )


def replayed_record(ctx: StepContext, row: ReleasedRow) -> RecordedReplay:
    """The record of one replayed row."""
    first = row.stored[0]
    version = min(sample.policy_version for sample in row.stored)
    old, rollout, advantages = (
        np.concatenate([getattr(s, name)[s.response_mask] for s in row.stored]).astype(np.float64)
        for name in ("old_logprobs", "rollout_logprobs", "advantages")
    )
    reward = first.reward
    return RecordedReplay(
        group=first.trajectory_id.group,
        member=first.trajectory_id.member,
        prompt_id=first.prompt_id,
        step=collected_in(first.trajectory_id.group),
        policy_version=version,
        age=ctx.policy_version - version,
        reward=RecordedReward(
            outcome=_rounded(reward.outcome),
            intrinsic=_rounded(reward.intrinsic),
            format=_rounded(reward.format),
            total=_rounded(row.reward),
            parts=_parts(reward),
        ),
        stored_advantage=_mean(advantages) or 0.0,
        advantage=_rounded(row.advantage),
        baseline=None if row.baseline is None else _rounded(row.baseline),
        weight=_rounded(row.weight),
        segments=tuple(sample.segment for sample in row.stored),
        num_tokens=len(old),
        num_tool_calls=sum(sample.tool_calls for sample in row.stored),
        old_logprob_mean=_mean(old),
        rollout_logprob_mean=_mean(rollout),
        ratio_mean=_mean(np.exp(np.minimum(old - rollout, 700.0))),
    )


def _reward(reward: Reward, intrinsic_weight: float) -> RecordedReward:
    return RecordedReward(
        outcome=_rounded(reward.outcome),
        intrinsic=_rounded(reward.intrinsic),
        format=_rounded(reward.format),
        total=_rounded(reward.total(intrinsic_weight)),
        parts=_parts(reward),
    )


def _parts(reward: Reward) -> dict[str, float | None]:
    return {name: _number(value) for name, value in reward.parts.items()}


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else _rounded(value)


def _numbers(values: npt.NDArray[np.floating], digits: int) -> Numbers:
    """As decimal numbers; None where a value is not finite."""
    if len(values) > _MANY and np.isfinite(values).all():
        return tuple(np.round(values.astype(np.float64), digits).tolist())
    return tuple(
        round(value, digits) if math.isfinite(value) else None for value in values.tolist()
    )


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    return _number(float(values.mean())) if len(values) else None
