"""Control-plane records: what flows from prompt to optimizer step, all frozen.

Every record is made once and never edited; a later stage makes a new one (``dataclasses.replace``).
Arrays are numpy: torch starts at ``algorithms``. Index ``t`` always speaks of token ``t``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
Message = Mapping[str, Any]

# ALFWorld's; here because both the settings and the environment workers, which do without
# pydantic, name them.
TaskType = Literal[
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
]
TASK_TYPES: tuple[TaskType, ...] = get_args(TaskType)

# WebShop's, here for the same reason.
ProductCategory = Literal["beauty", "electronics", "fashion", "garden", "grocery"]
PRODUCT_CATEGORIES: tuple[ProductCategory, ...] = get_args(ProductCategory)


class Status(StrEnum):
    """How a trajectory ended."""

    COMPLETED = "completed"
    TRUNCATED_LENGTH = "truncated_length"
    TRUNCATED_TURNS = "truncated_turns"
    FAILED_PARSE = "failed_parse"
    FAILED_TOOL = "failed_tool"
    FAILED_ENGINE = "failed_engine"
    ABORTED = "aborted"

    @property
    def failed(self) -> bool:
        """True when the trajectory says nothing about the policy and must not be scored."""
        return self.value.startswith("failed") or self is Status.ABORTED


class Origin(StrEnum):
    """Where the samples of an update come from."""

    ON_POLICY = "on_policy"
    REPLAY = "replay"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One task instance.

    ``env`` names the environment, ``kind`` the kind of task in it (success is also told by kind),
    ``metadata`` are its reset options (picklable plain values), ``messages`` the chat before the
    first observation (a system message, say).
    """

    prompt_id: str
    env: str
    kind: str = ""
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryId:
    """Which attempt: the group (one per prompt drawn) and the member in it (0-based)."""

    group: str
    member: int

    def __str__(self) -> str:
        return f"{self.group}/{self.member}"


RowKey = tuple[TrajectoryId, int]
"""A row: a trajectory and the number of one of its segments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call: the tool, its arguments as the model wrote them (JSON or plain text), its end.

    ``succeeded`` is False when the call could not be parsed, raised, or ran out of time. In a game
    every action is a call.
    """

    name: str
    arguments: str
    succeeded: bool


class VersionSpan(NamedTuple):
    """``num_tokens`` tokens in a row drawn from the weights of ``policy_version``."""

    policy_version: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One generation and what came before it.

    ``observation_tokens`` int32 ``[O]`` are the tokens that are new since the last action of the
    same segment (the whole prompt in a segment's first turn); ``action_tokens`` int32 ``[A]`` were
    sampled with ``action_logprobs`` float32 ``[A]`` by the engine, which says in ``versions`` from
    which weights: spans that add up to A tokens. ``text`` is what they decode to. The view reads
    it behind the ``<think>`` of a template that opens the thought: ``action_text`` is the action
    it reads, ``void`` says that the answer neither acts nor answers, ``valid`` that the action was
    well formed and possible. ``observation`` is the environment's text that was answered.

    Example: observation ``[5, 6, 7]``, action ``[9, 2]``, logprobs ``[-0.1, -0.3]``: five
    tokens, the last two of them trained.
    """

    observation_tokens: TokenArray
    action_tokens: TokenArray
    action_logprobs: FloatArray
    finish_reason: str
    versions: tuple[VersionSpan, ...]
    time_s: float = 0.0
    text: str = ""
    action_text: str = ""
    valid: bool = True
    void: bool = False
    tool_calls: tuple[ToolCall, ...] = ()
    anchor: str = ""
    observation: str = ""

    def __post_init__(self) -> None:
        assert len(self.action_tokens) == len(self.action_logprobs), "one log-prob per action token"
        counted = sum(span.num_tokens for span in self.versions)
        assert counted == len(self.action_tokens), "one version per action token"


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A context that only grows: turns whose rendered prompts extend the tokens before them.

    Tokens, mask and log-probs are derived from the turns, so nothing is tokenised twice and the
    mask cannot be wrong.

    Example: turns (obs ``[5, 6]``, act ``[9]``) and (obs ``[7]``, act ``[8, 2]``) give token_ids
    ``[5, 6, 9, 7, 8, 2]`` and response_mask ``[F, F, T, F, T, T]``.
    """

    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        """Length L of the context, observations and actions."""
        return sum(len(t.observation_tokens) + len(t.action_tokens) for t in self.turns)

    @property
    def token_ids(self) -> TokenArray:
        """int32 ``[L]``."""
        parts = [p for t in self.turns for p in (t.observation_tokens, t.action_tokens)]
        return _joined(parts).astype(np.int32)

    @property
    def response_mask(self) -> BoolArray:
        """bool ``[L]``: True on tokens the policy sampled."""
        parts = [
            np.full(len(tokens), sampled)
            for t in self.turns
            for tokens, sampled in ((t.observation_tokens, False), (t.action_tokens, True))
        ]
        return _joined(parts).astype(np.bool_)

    @property
    def rollout_logprobs(self) -> FloatArray:
        """float32 ``[L]``: the engine's log-probs, 0 outside the mask."""
        parts = [
            values
            for t in self.turns
            for values in (np.zeros(len(t.observation_tokens), np.float32), t.action_logprobs)
        ]
        return _joined(parts).astype(np.float32)

    @property
    def turn_starts(self) -> TokenArray:
        """int32 ``[num_turns]``: index of each turn's first action token."""
        starts, at = [], 0
        for turn in self.turns:
            at += len(turn.observation_tokens)
            starts.append(at)
            at += len(turn.action_tokens)
        return np.asarray(starts, np.int32)


def _joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """All turns of one attempt, as segments; ``env_reward`` is the sum the environment gave."""

    id: TrajectoryId
    prompt: Prompt
    segments: tuple[Segment, ...]
    status: Status
    env_reward: float = 0.0
    won: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns in the order they happened."""
        return tuple(turn for segment in self.segments for turn in segment.turns)

    @property
    def num_action_tokens(self) -> int:
        """Tokens the policy sampled."""
        return sum(len(turn.action_tokens) for turn in self.turns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """The reward in parts, kept apart so that replay can weigh them anew.

    ``total(intrinsic_weight)`` is SPEAR Eq. 6: outcome + mu(t) * intrinsic + format.
    Example: ``Reward(outcome=1, intrinsic=0.3, format=-0.1).total(0.5)`` is 1.05.
    """

    outcome: float
    intrinsic: float = 0.0
    format: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def total(self, intrinsic_weight: float) -> float:
        """Shaped reward at the given intrinsic weight."""
        return self.outcome + intrinsic_weight * self.intrinsic + self.format


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredTrajectory:
    """A trajectory with its reward."""

    trajectory: Trajectory
    reward: Reward


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryGroup:
    """The trajectories of one prompt, before scoring; ``failures`` are recorded, never scored."""

    group_id: str
    prompt: Prompt
    members: tuple[Trajectory, ...]
    failures: tuple[Trajectory, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    """A group after rewards: only members that may enter the statistics."""

    group_id: str
    prompt: Prompt
    members: tuple[ScoredTrajectory, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSample:
    """One segment, ready for the policy.

    All arrays have length L (the segment's tokens). ``response_mask`` is False everywhere in a
    row that was marked as unfit to learn from. ``advantages`` is 0 outside ``response_mask``;
    ``old_logprobs`` (the policy before the update) is the ratio's denominator. ``num_segments``
    is the number of segments of the same trajectory, so that statistics count a trajectory once.
    """

    trajectory_id: TrajectoryId
    segment: int
    num_segments: int
    prompt_id: str
    token_ids: TokenArray
    response_mask: BoolArray
    rollout_logprobs: FloatArray
    old_logprobs: FloatArray
    advantages: FloatArray
    reward: Reward
    turn_starts: TokenArray
    anchors: tuple[str, ...]
    policy_version: int
    tool_calls: int = 0

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        for name in ("response_mask", "rollout_logprobs", "old_logprobs", "advantages"):
            assert len(getattr(self, name)) == length, f"{name} must have one entry per token"


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """Samples that enter one optimizer step together, and the weight of their loss (Eq. 5)."""

    samples: tuple[TrainSample, ...]
    origin: Origin
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """SPEAR's schedules at one step: mu(t) (Eq. 14) and gamma(t) (Eq. 13)."""

    intrinsic_weight: float
    replay_weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """What every stage of one trainer step may know (step is 1-based)."""

    step: int
    policy_version: int
    coefficients: Coefficients
    seed: int


class Fate(StrEnum):
    """What became of a prompt: trained on; played and left out of training; no attempt worked."""

    TRAINED = "trained"
    FILTERED = "filtered"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsumedPrompt:
    """One prompt that a step consumed; ``position`` is the cursor's, plain JSON values."""

    position: Any
    prompt_id: str
    fate: Fate


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one trainer step gave: metrics by name (``reward/mean``, ``time/rollout_s``), the
    prompts it consumed, and one of its trajectories to show, if there is any."""

    step: int
    policy_version: int
    metrics: Mapping[str, float]
    consumed: tuple[ConsumedPrompt, ...] = ()
    example: ScoredTrajectory | None = None
