"""The method's settings: rewards, advantages, losses, replay, schedules.

Defaults are the corrected SPEAR (arXiv 2509.22601) with the bag of tricks it calls Dr.BoT.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_spear.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    Section,
)
from megatron_spear.config.losses import (
    ClipCovLossSection,
    ClippedLossSection,
    KlSection,
    LossSection,
    OffPolicyCorrectionSection,
    RatioFilterSection,
)

Schedule = Literal["constant", "linear", "cosine"]
"""Shape of a weight over the trainer steps."""


class DistinctCallsSection(Section):
    """Pays for successful calls of a trajectory, each distinct one once; in games an action is a
    call."""

    type: Literal["distinct_calls"] = "distinct_calls"
    """Which intrinsic reward."""
    per_call: NonNegativeFloat = 0.01
    """Paid for each successful call unlike all successful ones before (before mu)."""
    max: NonNegativeFloat = 0.1
    """Most for one trajectory (before mu)."""


class PlainIntrinsicSection(Section):
    """An intrinsic reward without settings of its own: one of the released code's, or none."""

    type: Literal["official_linear", "official_qwen3", "official_steps", "none"]
    """official_linear = 0.1 for each turn with calls, at most 1; official_qwen3 = the same where
    the outcome is 0 or less, else 1 for any call; official_steps = 0.1 for each turn survived, at
    most 1; none = 0. The released code gives 1 to a solved problem and 10 to a won game (see
    ``success``)."""


IntrinsicSection = DistinctCallsSection | PlainIntrinsicSection
"""Any of the intrinsic rewards, chosen by ``type``."""


class RewardSection(Section):
    """What a trajectory earns."""

    success: float = 1.0
    """Outcome of a won attempt."""
    failure: float = 0.0
    """Outcome of a lost attempt, below ``success`` (paper: -1 in math, 0 in games)."""
    intrinsic: Annotated[IntrinsicSection, Field(discriminator="type")] = DistinctCallsSection()
    """The intrinsic part (Eq. 15), weighed with mu: ``type`` is distinct_calls, official_linear,
    official_qwen3, official_steps or none."""
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


class OfficialSection(Section):
    """What ``algorithm.compat: official`` needs to know; not read by the corrected method."""

    tree: Literal["math", "agent"] = "agent"
    """Which of the two official trees: math has a row a trajectory (needs ``env.history: full``),
    agent a row a turn (needs a window)."""
    micro_batch_rows: PositiveInt = 8
    """Rows of a micro-batch: its statistics and normalisation enter the official loss."""
    every_turn_counts: bool = True
    """In the agent tree's group statistics every turn counts (as in all released scripts), so long
    trajectories weigh more; False = each trajectory counts once."""
    min_released_rows: NonNegativeInt = 1
    """A smaller replay batch is dropped (the official code's number of GPUs)."""


class RowFiltersSection(Section):
    """Dr.BoT's row filters: rows that nothing is learned from, no loss, KL or entropy bonus.

    A row is a trajectory with ``env.history: full`` and a turn with a window."""

    overlong: bool = True
    """Rows that used up their token budget."""
    void: bool = True
    """Rows with a turn that neither acts nor answers."""
    repetitive: bool = True
    """Rows with a turn in which some run of 20 tokens occurs 10 times."""
    unreadable: bool = True
    """Rows with text that was decoded wrongly."""
    in_group_statistics: bool = False
    """Whether a trajectory all of whose rows are marked still counts in its group's mean and
    spread, and a marked turn among GiGPO's turns with its anchor, as they always do in the official
    mode. The history of group means, which measures the policy, counts all trajectories either
    way."""


class AlgorithmSection(Section):
    """Advantages, policy loss, filters. Defaults are Dr.BoT's, SPEAR's baseline
    (arXiv 2509.22601)."""

    compat: Literal["corrected", "official"] = "corrected"
    """corrected = the method as meant; official = the numbers of the released SPEAR code, its
    defects included, for comparison. Of ``replay`` the official mode reads capacity,
    baseline_history, max_age, loss, baseline (p50 or decay) and decay; it releases in bursts of its
    own kind, whatever ``replay.release`` says, and what enters is the tree's rule."""
    official: OfficialSection = OfficialSection()
    """Settings of the official mode."""
    advantage: Literal["grpo", "rloo", "reinforce_pp_baseline", "gigpo"] = "grpo"
    """What a reward is compared with: the group's mean (grpo; gigpo adds turns with the same
    anchor), the other members' mean (rloo), or the group's mean, whitened over the step's tokens
    (reinforce_pp_baseline). The default, grpo with ``normalize_std: false`` and ``aggregation:
    seq-mean-token-sum-norm``, is Dr. GRPO (arXiv 2503.20783)."""
    normalize_std: bool = False
    """Divide by the group's standard deviation: true is GRPO's original form (arXiv 2402.03300,
    there with ``aggregation: seq-mean-token-mean``), false GRPO without std, Dr. GRPO's half that
    concerns advantages. With ``advantage: grpo`` only. Replayed advantages are divided alike, by
    the spread that goes with ``replay.baseline``."""
    gigpo: GigpoSection = GigpoSection()
    """GiGPO's own settings."""
    loss: Annotated[LossSection, Field(discriminator="type")] = ClippedLossSection()
    """Loss of the on-policy tokens: ``type`` is clipped, clip_cov, kl_cov or gpg."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus in the loss, on-policy tokens only."""
    kl: KlSection = KlSection()
    """KL to the reference policy."""
    off_policy_correction: OffPolicyCorrectionSection = OffPolicyCorrectionSection()
    """What is done about log-probs in which engine and policy differ."""
    aggregation: Literal[
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
        "group-mean-token-mean",
    ] = "seq-mean-token-sum-norm"
    """How token losses are averaged into one number (algorithms/aggregation.py). token-mean is
    DAPO's; seq-mean-token-mean GRPO's; seq-mean-token-sum-norm, over a constant length, the half of
    Dr. GRPO that concerns the loss; group-mean-token-mean the mean over groups of their tokens'
    means."""
    norm_length: PositiveInt = 128
    """Constant length that ``seq-mean-token-sum-norm`` divides by, in tokens."""
    row_filters: RowFiltersSection = RowFiltersSection()
    """Rows that nothing is learned from."""
    keep_groups_fraction: Fraction = 0.75
    """Share of groups kept, those with the highest reward spread."""
    dynamic_sampling_rounds: NonNegativeInt = 0
    """Further rounds of rollouts a step, at most, in which groups of equal rewards are replaced by
    groups of further prompts (DAPO, arXiv 2503.14476); 0 = none."""
    old_logprobs: Literal["policy", "engine"] = "policy"
    """Denominator of the ratio: recomputed by the policy before the update, or the engine's own
    (saves a forward pass, but for covariance of rollouts that lag behind; right where engine and
    policy agree, as in fp32 on one machine)."""
    mini_batches: PositiveInt = 1
    """Optimizer steps a trainer step."""


class ReplaySection(Section):
    """Self-imitation replay (Eq. 1-5)."""

    enabled: bool = True
    """Replay at all; False = plain on-policy training."""
    capacity: PositiveInt = 512
    """Most trajectories kept; the oldest go first. With ``release: burst`` the most replayed at
    once."""
    max_age: NonNegativeInt = 5
    """Oldest replayed trajectory, in policy versions. Above ``rollout.max_lag``: at the first step
    that can replay it, a trajectory is one older. (The official mode counts trainer steps.)"""
    release: Literal["continuous", "burst"] = "continuous"
    """continuous = some trajectories every step; burst = none until more than 1.5 x capacity of
    them would be kept, then at most capacity at once, and the rest is forgotten (when the official
    code replays; between bursts only age bounds what is stored)."""
    rows_per_step: PositiveInt = 24
    """Most trajectories replayed in one trainer step (``release: continuous``)."""
    reuse: bool = False
    """A replayed trajectory stays and may be drawn in later steps too, until ``max_age`` or
    ``capacity`` ends it; False = each is replayed once, as in the paper. ``release: continuous``
    only."""
    baseline: Literal["p50", "batch_mean", "per_prompt", "decay", "none"] = "p50"
    """Recalibration. A trajectory's new advantage is its reward minus p50: the median of recent
    group means (Eq. 2); batch_mean: the mean reward of this step's trajectories; per_prompt: the
    mean of its own prompt's recent group means (p50 once these have left the history). It is one
    number for all its tokens, with GiGPO too, whose turn-level part is dropped. Where new
    advantages are divided by their group's standard deviation (``algorithm.normalize_std``, GiGPO's
    mean_std_norm) it is divided by the median of recent groups' (p50), by that of this step's
    trajectories (batch_mean), or by the mean of its own prompt's (per_prompt). Without
    recalibration: decay = the stored advantages, token by token, times ``decay``; none = the stored
    advantages (vanilla self-imitation, Eq. 1). Kept are trajectories with a positive advantage."""
    decay: PositiveFraction = 1.0
    """Factor of stored advantages, once, whatever their age; with ``baseline: decay`` only."""
    baseline_history: PositiveInt = 80
    """Group means in the history of recent ones."""
    loss: Annotated[LossSection, Field(discriminator="type")] = ClipCovLossSection()
    """Loss of the replayed tokens: ``type`` is clipped, clip_cov, kl_cov or gpg."""
    combine: Literal["joint", "separate_step"] = "joint"
    """joint = replayed and new trajectories share the optimizer steps (Eq. 5); separate_step =
    replayed ones get optimizer steps of their own after the others, in which Adam largely undoes
    the replay weight (as in the official code)."""
    ratio_filter: RatioFilterSection | None = RatioFilterSection()
    """Leave out replayed trajectories that the policy has moved away from; None = keep all."""
    gradient_norms: bool = False
    """Report the gradient norms of new and replayed trajectories apart (joint only); holds one more
    gradient in memory."""
    require_valid_action: bool = True
    """Only trajectories with at least one valid action enter."""
    require_tool_call: bool = False
    """Only trajectories with at least one tool call enter; for tasks with tools."""


class TaskSamplingSection(Section):
    """Which tasks the next prompts are: drawn over buckets (ALFWorld's task types) by measured
    difficulty."""

    enabled: bool = False
    """Draw by difficulty; False = prompts in the order of their source."""
    decay: PositiveFraction = 0.9
    """What a step's wins and attempts still count one step later; 1 = all steps count alike."""
    min_share: Fraction = 0.05
    """Smallest probability of a bucket, so that none starves; the rest is shared by p (1 - p)."""


class CurriculumSection(Section):
    """SPEAR's schedules (Eq. 13-14) and the choice of tasks."""

    replay_weight: NonNegativeFloat = 1.0
    """gamma at the end of the warm-up."""
    replay_schedule: Schedule = "cosine"
    """Shape of gamma's warm-up; constant = the full weight always."""
    replay_warmup_steps: NonNegativeInt = 15
    """Trainer steps of gamma's warm-up, 0 = full from the start; not read when constant."""
    intrinsic_weight: NonNegativeFloat = 1.0
    """mu at the start."""
    intrinsic_schedule: Schedule = "cosine"
    """Shape of mu's decay; constant = the full weight always."""
    intrinsic_decay_steps: NonNegativeInt = 20
    """Trainer steps of mu's decay, 0 = no intrinsic reward; not read when constant."""
    tasks: TaskSamplingSection = TaskSamplingSection()
    """Task sampling by difficulty."""
