"""The method's settings: rewards, advantages, losses, replay, schedules.

Defaults are the corrected SPEAR (arXiv 2509.22601) with the bag of tricks it calls Dr.BoT.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_spear.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class RewardSection(Section):
    """What a trajectory earns."""

    success: float = 1.0
    """Outcome of a won game; a lost one gets 0."""
    intrinsic_per_action: NonNegativeFloat = 0.01
    """Intrinsic reward per distinct valid action (before mu)."""
    intrinsic_max: NonNegativeFloat = 0.1
    """Most intrinsic reward of one trajectory (before mu)."""
    invalid_action_penalty: NonNegativeFloat = 0.0
    """Taken off the reward of a turn with an invalid action (paper: 0.1, where a win earns 10)."""


class GigpoSection(Section):
    """GiGPO's step-level part (arXiv 2505.10978); read with ``algorithm.advantage: gigpo`` only."""

    step_weight: NonNegativeFloat = 1.0
    """Weight of a turn's advantage in its step group, beside the trajectory's in its group."""
    mode: Literal["mean_norm", "mean_std_norm"] = "mean_norm"
    """Subtract a group's mean, or also divide by its standard deviation; for both parts."""
    discount: Fraction = 0.95
    """Discount of later turns' rewards, per turn."""


class AlgorithmSection(Section):
    """Advantages, policy loss, filters. Defaults are Dr.BoT's, SPEAR's baseline
    (arXiv 2509.22601)."""

    advantage: Literal["grpo", "rloo", "reinforce_pp_baseline", "gigpo"] = "grpo"
    """What a reward is compared with: the group's mean (grpo; gigpo adds turns with the same
    anchor), the other members' mean (rloo), or the group's mean, whitened over the step's tokens
    (reinforce_pp_baseline)."""
    normalize_std: bool = False
    """Divide by the group's standard deviation (GRPO's original form; false is Dr. GRPO). With
    ``advantage: grpo`` only."""
    gigpo: GigpoSection = GigpoSection()
    """GiGPO's own settings."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """Upper clip of the ratio: 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1.0)] = 10.0
    """Bound of the loss for negative advantages: -advantage * dual_clip."""
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "seq-mean-token-sum-norm"
    """How token losses are averaged into one number."""
    norm_length: PositiveInt = 128
    """Constant length that ``seq-mean-token-sum-norm`` divides by, in tokens."""
    keep_groups_fraction: Fraction = 0.75
    """Share of groups kept, those with the highest reward spread."""
    old_logprobs: Literal["policy", "engine"] = "policy"
    """Denominator of the ratio: recomputed by the policy before the update, or the engine's own
    (saves a forward pass; right where engine and policy agree, as in fp32 on one machine)."""
    mini_batches: PositiveInt = 1
    """Optimizer steps a trainer step."""


class CovarianceClipSection(Section):
    """SPEAR's covariance clipping (Eq. 18-21): tokens drawn from a band lose their gradient."""

    fraction: Fraction = 0.02
    """Share of tokens dropped, at most."""
    low: float = 2.0
    """Lower end of the covariance band, exclusive."""
    high: float = 60.0
    """Upper end of the covariance band, exclusive."""


class ReplaySection(Section):
    """Self-imitation replay (Eq. 2-5)."""

    enabled: bool = True
    """Replay at all; False = plain on-policy training."""
    capacity: PositiveInt = 512
    """Most trajectories kept; the oldest go first."""
    max_age: NonNegativeInt = 5
    """Oldest replayed trajectory, in policy versions."""
    rows_per_step: PositiveInt = 24
    """Most trajectories replayed in one trainer step; each is replayed once."""
    baseline: Literal["p50"] = "p50"
    """Recalibration: reward minus the median of recent group means (Eq. 2)."""
    baseline_history: PositiveInt = 80
    """Group means in that history."""
    covariance_clip: CovarianceClipSection | None = CovarianceClipSection()
    """Covariance clipping of replayed tokens; None = none."""
    require_valid_action: bool = True
    """Only trajectories with at least one valid action enter."""


class CurriculumSection(Section):
    """SPEAR's schedules (Eq. 13-14)."""

    replay_weight: NonNegativeFloat = 1.0
    """gamma at the end of the warm-up."""
    replay_warmup_steps: NonNegativeInt = 15
    """Trainer steps of gamma's cosine warm-up; 0 = full from the start."""
    intrinsic_weight: NonNegativeFloat = 1.0
    """mu at the start."""
    intrinsic_decay_steps: NonNegativeInt = 20
    """Trainer steps of mu's cosine decay; 0 = no intrinsic reward."""
