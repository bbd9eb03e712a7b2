"""What the trajectories of a run were: the records of ``trajectories/step-00000012.jsonl.gz``.

One file a trainer step (``recorded_files`` writes and reads them), one JSON object a line: first
the step itself, then a line a trajectory, then a line a replayed row::

    {"format": 1, "step": 12, "policy_version": 11, "intrinsic_weight": 0.4, ...}
    {"trajectory": {"group": "0.12/game-7", "member": 0, "status": "completed", "turns": [...]}}
    {"replayed": {"group": "0.9/game-3", "member": 2, "age": 3, "advantage": 0.5, ...}}

Nothing here needs torch. Log-probs are rounded to 4 digits behind the point, other numbers to 6;
one that is not finite is None.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_spear.types import ToolCall, VersionSpan

FORMAT = 1
"""Changes when a field changes its meaning or goes; a new field has a default instead."""

Numbers = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedReward:
    """A reward in its parts; ``total`` is outcome + mu * intrinsic + format (SPEAR Eq. 6), with the
    mu of the step that recorded it. One of ``parts`` that is not finite is None."""

    outcome: float
    intrinsic: float
    format: float
    total: float
    parts: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedTurn:
    """One generation and what it answered.

    ``observation`` is the environment's text; ``num_observation_tokens`` are new in the segment (in
    its first turn the whole prompt). ``tokens`` are the texts of the A sampled tokens, special ones
    too: joined they are ``text``. Where a character is spread over several tokens the last of them
    has it and the others are empty; where a tokenizer's texts cannot be joined at all, ``text`` is
    right and each of ``tokens`` is decoded alone. ``action`` is what the environment was given.

    ``rollout_logprobs`` (engine), ``old_logprobs`` (policy before the update) and ``advantages``
    have A entries; the last two are None where the turn was not trained on. ``versions`` are spans
    of tokens from one policy version. ``valid``: well formed and possible; ``void``: neither an
    action nor an answer.

    Example: tokens ``(" go", " to", " desk 1", "<|im_end|>")``, text ``" go to desk 1<|im_end|>"``,
    rollout_logprobs ``(-0.1, -0.0, -1.2, -0.0)``, advantages ``(0.5, 0.5, 0.5, 0.5)``, versions
    ``((11, 4),)``.
    """

    segment: int
    observation: str
    num_observation_tokens: int
    text: str
    action: str
    tokens: tuple[str, ...]
    rollout_logprobs: Numbers
    old_logprobs: Numbers | None
    advantages: Numbers | None
    versions: tuple[VersionSpan, ...]
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    time_s: float
    valid: bool
    void: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedTrajectory:
    """One attempt, a failed one too: ``reward`` and ``group_mean`` are None then, and ``error``
    says why.

    - ``prompt``: the text of the first prompt, as the engine got it.
    - ``group_mean``: mean shaped reward of the group's members that count.
    - ``left_out``: why its group taught nothing: ``equal_rewards``, ``small_spread`` (others spread
      more), ``replaced`` (by dynamic sampling, or left out by a hook), ``all_failed``,
      ``all_marked`` (no member counts), ``incomplete`` (official mode); "" where it did.
    - ``segment_marks``: for each segment which row filters marked it (``overlong``, ``void``,
      ``repetitive``, ``unreadable``): nothing is learned from a marked one.
    - ``trained``: some of its tokens were in an optimizer step. ``stored``: it entered replay.
    """

    group: str
    member: int
    prompt_id: str
    kind: str
    env: str
    status: str
    won: bool
    env_reward: float | None
    reward: RecordedReward | None
    group_mean: float | None
    left_out: str
    segment_marks: tuple[tuple[str, ...], ...]
    trained: bool
    stored: bool
    error: str
    prompt: str
    turns: tuple[RecordedTurn, ...]

    @property
    def id(self) -> str:
        """The trajectory's name in all of the run: ``0.12/game-7/0``."""
        return f"{self.group}/{self.member}"

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks of all segments, each once, sorted."""
        return tuple(sorted({mark for marks in self.segment_marks for mark in marks}))


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedReplay:
    """One replayed row: a trajectory of an earlier step that was trained on once more.

    - ``step`` collected it (None where its group's name does not tell), with the weights of
      ``policy_version``, the oldest of its tokens; ``age`` counts policy versions since then.
    - ``stored_advantage``: mean over its tokens at collection; ``advantage``: the same now, after
      recalibration; ``baseline``: what its reward was compared with (None where the stored
      advantages were kept or scaled), the difference being divided where new ones are.
      ``reward.total`` has the present mu; in official mode the one of collection.
    - ``weight``: gamma(t), the weight of its loss.
    - ``segments``: those that were trained on: all of the trajectory, or in official mode the one
      that the row is. ``num_tokens`` and ``num_tool_calls`` are theirs.
    - ``old_logprob_mean`` and ``rollout_logprob_mean`` are stored: of the policy before its update,
      which is the ratio's denominator, and of the engine; ``ratio_mean`` is the mean of
      exp(old - rollout) over its tokens.

    Example: a win (reward 1) of step 9 replayed in step 12 against a median of 0.5, with
    stored_advantage 0.75: step 9, policy_version 8, age 3, baseline 0.5, advantage 0.5.
    """

    group: str
    member: int
    prompt_id: str
    step: int | None
    policy_version: int
    age: int
    reward: RecordedReward
    stored_advantage: float
    advantage: float
    baseline: float | None
    weight: float
    segments: tuple[int, ...]
    num_tokens: int
    num_tool_calls: int
    old_logprob_mean: float | None
    rollout_logprob_mean: float | None
    ratio_mean: float | None

    @property
    def id(self) -> str:
        """The trajectory's name, as in ``RecordedTrajectory.id``."""
        return f"{self.group}/{self.member}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """One trainer step: its number (1-based), the policy version it started from, mu(t) and
    gamma(t), how many groups and trajectories were played in it, and those that are recorded: whole
    groups, and all replayed rows."""

    step: int
    policy_version: int
    intrinsic_weight: float
    replay_weight: float
    num_groups: int
    num_trajectories: int
    trajectories: tuple[RecordedTrajectory, ...] = ()
    replayed: tuple[RecordedReplay, ...] = ()
