"""Settings of the policy loss, on-policy and replayed alike, and of what is added to it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_spear.config.base import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    Section,
)


class ClippedLossSection(Section):
    """PPO's clipped surrogate with separate bounds (clip-higher) and a dual clip."""

    type: Literal["clipped"] = "clipped"
    """Which loss."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """Upper clip of the ratio: 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = 10.0
    """Bound of the loss for negative advantages: -advantage * dual_clip; None = none."""


class ClipCovLossSection(Section):
    """The clipped surrogate; tokens drawn from a band of covariance lose their gradient (SPEAR
    Eq. 18-21)."""

    type: Literal["clip_cov"] = "clip_cov"
    """Which loss."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Lower clip of the ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """Upper clip of the ratio: 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = 10.0
    """Bound of the loss for negative advantages: -advantage * dual_clip; None = none."""
    fraction: Fraction = 0.02
    """Share of a mini-batch's tokens dropped, at most; 0 = none."""
    low: float = 2.0
    """Lower end of the covariance band, exclusive."""
    high: float = 60.0
    """Upper end of the covariance band, exclusive."""

    @model_validator(mode="after")
    def _band(self) -> "ClipCovLossSection":
        if self.low >= self.high:
            raise ValueError(
                f"low={self.low:g} is not below high={self.high:g}: the band is empty; "
                "expected low < high"
            )
        return self


class KlCovLossSection(Section):
    """Unclipped surrogate; the tokens of highest covariance pay for leaving the old policy
    (arXiv 2505.22617)."""

    type: Literal["kl_cov"] = "kl_cov"
    """Which loss."""
    fraction: Fraction = 0.002
    """Share of a mini-batch's tokens that pay; 0 = none."""
    coef: NonNegativeFloat = 0.1
    """What they pay: coef * abs(log ratio)."""


class GpgLossSection(Section):
    """Plain policy gradient, -advantage * logprob, without a ratio (arXiv 2504.02546)."""

    type: Literal["gpg"] = "gpg"
    """Which loss."""


LossSection = ClippedLossSection | ClipCovLossSection | KlCovLossSection | GpgLossSection
"""Any of the losses, chosen by ``type``."""


class KlSection(Section):
    """KL to the reference policy, the one the run started from; on-policy tokens only."""

    coef: NonNegativeFloat = 0.0
    """Weight of the KL in the loss; 0 = none, and no reference weights are kept (Dr.BoT)."""
    estimator: Literal["k1", "abs", "k2", "k3"] = "k2"
    """Estimate from the sampled token (algorithms/kl.py); k2's mean gradient is that of the KL."""


class OffPolicyCorrectionSection(Section):
    """Correction of the engine-trainer mismatch: importance weights old / rollout probability."""

    mode: Literal["none", "token-truncate", "sequence-truncate", "token-mask", "sequence-mask"] = (
        "none"
    )
    """none = measured, not corrected; truncate = weights above ``high`` are cut to it; mask =
    tokens (or trajectories) with weights outside ``low``..``high`` are left out."""
    low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Smallest weight kept, by the masks only."""
    high: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest weight kept."""


class RatioFilterSection(Section):
    """Bounds of a replayed trajectory's ratio, the geometric mean over its tokens."""

    low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Smallest ratio trained on."""
    high: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest ratio trained on."""
