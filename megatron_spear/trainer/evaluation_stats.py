"""What an evaluation comes to: mean@n, pass@k, success by kind, and intervals over prompts.

A failed attempt says nothing about the policy: it is counted, and enters no other number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from megatron_spear.types import Status, Trajectory, TrajectoryGroup

RESAMPLES = 10_000
"""Panels that an interval is made of."""

_DRAWN_AT_ONCE = 1 << 20
_TRUNCATED = (Status.TRUNCATED_LENGTH, Status.TRUNCATED_TURNS)


@dataclass(frozen=True, kw_only=True)
class PlayedPrompt:
    """The attempts at one prompt: of those that did not fail, who won and the environment's score.

    Example: of four attempts two won, one lost and one failed: ``won`` (True, False, True),
    ``scores`` (1.0, 0.0, 1.0), ``failed`` 1.
    """

    prompt_id: str
    kind: str
    won: tuple[bool, ...]
    scores: tuple[float, ...]
    failed: int

    @classmethod
    def of(cls, group: TrajectoryGroup) -> "PlayedPrompt":
        """The group's attempts."""
        return cls(
            prompt_id=group.prompt.prompt_id,
            kind=group.prompt.kind,
            won=tuple(member.won for member in group.members),
            scores=tuple(member.env_reward for member in group.members),
            failed=len(group.failures),
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over ``prompts`` prompts with its 95 % bootstrap interval.

    None = not known: the mean without a prompt, the interval with fewer than two.
    """

    value: float | None
    low: float | None
    high: float | None
    prompts: int

    @classmethod
    def of(cls, values: Sequence[float], seed: int) -> "Estimate":
        """Of one value a prompt."""
        low, high = bootstrap_interval(values, seed) or (None, None)
        value = float(np.mean(values)) if values else None
        return cls(value=value, low=low, high=high, prompts=len(values))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high, "prompts": self.prompts}


def pass_at_k(num_attempts: int, num_won: int, k: int) -> float:
    """Chance that at least one of ``k`` attempts wins, unbiased, of n attempts of which c won:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    Example: 4 attempts, 1 won: pass@1 is 1/4, pass@2 is 1 - 3/6 = 1/2, pass@4 is 1.
    """
    assert 1 <= k <= num_attempts and 0 <= num_won <= num_attempts
    return 1.0 - comb(num_attempts - num_won, k) / comb(num_attempts, k)


def ks_of(num_attempts: int) -> tuple[int, ...]:
    """The k that are told: powers of two below n, and n. Example: 6 gives 1, 2, 4, 6."""
    powers = (1 << i for i in range(num_attempts.bit_length()))
    return (*(k for k in powers if k < num_attempts), num_attempts)


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean of one value a prompt; None for fewer than two.

    Whole prompts are drawn with replacement, ``RESAMPLES`` times. A prompt's value is the mean of
    its attempts, so their chance is in the spread between the values already and attempts are not
    drawn once more. The same values and seed give the same interval on every machine.

    Example: values 0, 0, 0, 1 give 0 to 0.75: the panel has four ones or more in 0.4 % of draws.
    """
    if len(values) < 2:
        return None
    rng, own = np.random.default_rng(seed), np.asarray(values, np.float64)
    rows = max(1, _DRAWN_AT_ONCE // len(own))
    means = [
        own[rng.integers(len(own), size=(min(rows, RESAMPLES - done), len(own)))].mean(1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def mean_at_n(prompts: Sequence[PlayedPrompt], seed: int) -> Estimate:
    """Mean over prompts of the share of attempts won; prompts whose attempts all failed are left
    out."""
    return Estimate.of([float(np.mean(p.won)) for p in prompts if p.won], seed)


def pass_estimate(prompts: Sequence[PlayedPrompt], k: int, seed: int) -> Estimate:
    """Mean of pass@k over the prompts with ``k`` attempts that did not fail."""
    values = [pass_at_k(len(p.won), sum(p.won), k) for p in prompts if len(p.won) >= k]
    return Estimate.of(values, seed)


def statistics(groups: Sequence[TrajectoryGroup], *, attempts: int, seed: int) -> Mapping[str, Any]:
    """All numbers of an evaluation as plain values; ``seed`` keys the intervals.

    ``mean_at_n`` and ``score`` (the environment's reward) are estimates over prompts, ``pass_at_k``
    one for each k, ``by_kind`` mean@n by kind of task; ``trajectories`` has means over the attempts
    that did not fail, ``prompts`` what each prompt came to.
    """
    prompts = [PlayedPrompt.of(group) for group in groups]
    kinds = sorted({p.kind for p in prompts if p.kind})
    scores = [float(np.mean(p.scores)) for p in prompts if p.scores]
    return {
        "attempts": attempts,
        "mean_at_n": mean_at_n(prompts, seed).to_json(),
        "pass_at_k": {str(k): pass_estimate(prompts, k, seed).to_json() for k in ks_of(attempts)},
        "score": Estimate.of(scores, seed).to_json(),
        "by_kind": {
            kind: mean_at_n([p for p in prompts if p.kind == kind], seed).to_json()
            for kind in kinds
        },
        "trajectories": trajectory_means([m for group in groups for m in group.members])
        | {"failed": sum(p.failed for p in prompts)},
        "prompts": [
            {
                "prompt_id": p.prompt_id,
                "kind": p.kind,
                "attempts": len(p.won),
                "won": sum(p.won),
                "failed": p.failed,
                "score": float(np.mean(p.scores)) if p.scores else None,
            }
            for p in prompts
        ],
    }


def trajectory_means(played: Sequence[Trajectory]) -> dict[str, Any]:
    """Turns and tokens a trajectory, shares of invalid and void turns and of trajectories cut off.

    Example: one of 2 turns, one of 6 with 2 invalid: turns_mean 4.0, invalid_turn_fraction 0.25.
    """
    turns = [turn for trajectory in played for turn in trajectory.turns]
    per_trajectory, per_turn = max(1, len(played)), max(1, len(turns))
    return {
        "played": len(played),
        "turns_mean": len(turns) / per_trajectory,
        "action_tokens_mean": sum(t.num_action_tokens for t in played) / per_trajectory,
        "invalid_turn_fraction": sum(not turn.valid for turn in turns) / per_turn,
        "void_turn_fraction": sum(turn.void for turn in turns) / per_turn,
        "truncated_fraction": sum(t.status in _TRUNCATED for t in played) / per_trajectory,
    }
