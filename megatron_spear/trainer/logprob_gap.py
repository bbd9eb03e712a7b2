"""How far the engine's log-probs of its own tokens are from the policy's, token by token.

Both are of the distribution drawn from, so with equal weights only rounding parts them. A gap d =
engine - policy of a token makes its probability ratio policy / engine exp(-d).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_spear.replay.contents_text import printable
from megatron_spear.types import Reward, TrainSample, Trajectory

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Decode = Callable[[list[int]], str]

_PERCENTILES = (50, 90, 99, 99.9)
_RATIO_LIMITS = (0.8, 1.2)
_FIRST_BIN, _BIN_FACTOR = 64, 4
_CONTEXT = 16
"""Tokens shown before a worst one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenGaps:
    """One entry a sampled token: log-probs of both, where it stands in its segment (``position``),
    and which sample it is of."""

    engine: Array
    policy: Array
    position: IntArray
    sample: IntArray

    @property
    def gap(self) -> Array:
        """engine - policy, nats."""
        return self.engine - self.policy

    @property
    def mean(self) -> float:
        """The mean of |gap|."""
        return float(np.abs(self.gap).mean())


def samples_of(trajectories: Sequence[Trajectory]) -> list[TrainSample]:
    """Their segments, ready for the policy; without rewards or advantages."""
    return [
        TrainSample(
            trajectory_id=trajectory.id,
            segment=index,
            num_segments=len(trajectory.segments),
            prompt_id=trajectory.prompt.prompt_id,
            token_ids=segment.token_ids,
            response_mask=segment.response_mask,
            rollout_logprobs=segment.rollout_logprobs,
            old_logprobs=segment.rollout_logprobs,
            advantages=np.zeros(segment.num_tokens, np.float32),
            reward=Reward(outcome=0.0),
            turn_starts=segment.turn_starts,
            anchors=tuple(turn.anchor for turn in segment.turns),
            policy_version=0,
        )
        for trajectory in trajectories
        for index, segment in enumerate(trajectory.segments)
        if segment.response_mask.any()
    ]


def token_gaps(
    samples: Sequence[TrainSample], policy: Sequence[npt.NDArray[np.float32]]
) -> TokenGaps:
    """The sampled tokens of all samples; ``policy`` float32 ``[L]`` a sample."""
    places = [np.flatnonzero(sample.response_mask) for sample in samples]
    return TokenGaps(
        engine=_at(places, [sample.rollout_logprobs for sample in samples]),
        policy=_at(places, policy),
        position=np.concatenate(places).astype(np.int64),
        sample=np.repeat(np.arange(len(samples)), [len(place) for place in places]),
    )


def gap_text(
    gaps: TokenGaps, samples: Sequence[TrainSample], decode: Decode, top: int, allowed: float
) -> list[str]:
    """The gaps as lines: sums and percentiles, ratios, by position, the ``top`` worst tokens."""
    size, ratio = np.abs(gaps.gap), np.exp(-gaps.gap)
    outside = ((ratio < _RATIO_LIMITS[0]) | (ratio > _RATIO_LIMITS[1])).mean()
    percentiles = np.percentile(size, _PERCENTILES)
    named = ", ".join(f"p{p:g} {v:.2e}" for p, v in zip(_PERCENTILES, percentiles, strict=True))
    lines = [
        f"tokens            {len(size):,} in {len(samples)} contexts",
        f"|engine - policy| mean {gaps.mean:.2e} nats, max {size.max():.2e}, {named}",
        f"engine - policy   mean {gaps.gap.mean():+.2e} (an estimate of the divergence of the "
        "engine from the policy)",
        f"policy / engine   min {ratio.min():.4f}, mean {ratio.mean():.4f}, max {ratio.max():.4f}; "
        f"{outside:.2%} outside {_RATIO_LIMITS[0]:g} to {_RATIO_LIMITS[1]:g}",
        "",
        f"{'position in the context':26}{'tokens':>8}{'mean':>10}{'max':>10}",
        *_by_position(gaps.position, size),
        "",
        "worst tokens, with the text before them",
        *_worst(gaps, size, samples, decode, top),
        "",
    ]
    verdict = "normal" if gaps.mean <= allowed else "NOT NORMAL"
    return [*lines, f"{verdict}: a mean up to {allowed:g} nats is what this precision explains"]


def _at(places: Sequence[IntArray], values: Sequence[npt.NDArray[np.float32]]) -> Array:
    return np.concatenate([v[p] for p, v in zip(places, values, strict=True)]).astype(np.float64)


def _by_position(position: IntArray, size: Array) -> list[str]:
    """Rounding errors grow with the context: 0 to 63, 64 to 255, 256 to 1023 and so on."""
    lines, low, high = [], 0, _FIRST_BIN
    while low <= int(position.max()):
        own = size[(position >= low) & (position < high)]
        if len(own):
            where = f"{low:,} to {high - 1:,}"
            lines.append(f"{where:26}{len(own):>8,}{own.mean():>10.2e}{own.max():>10.2e}")
        low, high = high, high * _BIN_FACTOR
    return lines


def _worst(
    gaps: TokenGaps, size: Array, samples: Sequence[TrainSample], decode: Decode, top: int
) -> list[str]:
    lines = []
    for at in np.argsort(-size, kind="stable")[:top].tolist():
        sample, end = samples[gaps.sample[at]], int(gaps.position[at])
        before = sample.token_ids[max(0, end - _CONTEXT) : end].tolist()
        lines += [
            f"{gaps.gap[at]:+.2e}: policy {gaps.policy[at]:.4f}, engine {gaps.engine[at]:.4f}, "
            f"token {end} of {printable(str(sample.trajectory_id))}",
            f"    {_line(decode([int(sample.token_ids[end])]))} after {_line(decode(before))}",
        ]
    return lines


def _line(text: str) -> str:
    """The text on one line, in quotes."""
    return '"' + printable(text).replace("\n", "\\n").replace("\t", "\\t") + '"'
