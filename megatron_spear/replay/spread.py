"""How much rewards differ within a group, at any intrinsic weight, and who divides by it.

``R = fixed + mu * intrinsic`` with ``fixed = outcome + format``, so that the variance of a group is
``var(fixed) + 2 mu cov(fixed, intrinsic) + mu^2 var(intrinsic)``: three numbers, whatever mu is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.config.method import AlgorithmSection
from megatron_spear.types import ScoredTrajectory

SPREAD_PARTS = ("fixed_variance", "covariance", "intrinsic_variance")

_ROUNDING = 1e-12
"""A variance below this share of its terms is what rounding leaves of terms that cancel."""


def divides_by_spread(algorithm: AlgorithmSection) -> bool:
    """Whether a trajectory's advantage is divided by its group's standard deviation.

    ``reinforce_pp_baseline`` divides by one number for the whole step, which no group has.
    """
    if algorithm.advantage == "gigpo":
        return algorithm.gigpo.mode == "mean_std_norm"
    return algorithm.advantage == "grpo" and algorithm.normalize_std


def spread_parts(members: Sequence[ScoredTrajectory]) -> tuple[float, float, float]:
    """``SPREAD_PARTS`` of the members' rewards: unbiased, exactly 0 of equal ones and of one alone.

    The first counts what turns differ by inside a trajectory too, as the advantages do.

    Example: outcomes 1, 0 with intrinsic rewards 0.2, 0 give 0.5, 0.1, 0.02.
    """
    fixed = _deviations([m.reward.outcome + m.reward.format for m in members])
    intrinsic = _deviations([m.reward.intrinsic for m in members])
    others = max(1, len(members) - 1)
    within = float(np.mean([_format_variance(member) for member in members]))
    return (
        float(fixed @ fixed) / others + within,
        float(fixed @ intrinsic) / others,
        float(intrinsic @ intrinsic) / others,
    )


def spread_at(parts: Mapping[str, Any], intrinsic_weight: float) -> npt.NDArray[np.float64]:
    """Standard deviations of shaped rewards from columns of ``SPREAD_PARTS``."""
    fixed, covariance, intrinsic = (np.asarray(parts[n], np.float64) for n in SPREAD_PARTS)
    squares = fixed + intrinsic_weight**2 * intrinsic
    variance = squares + 2.0 * intrinsic_weight * covariance
    spreads: npt.NDArray[np.float64] = (
        np.where(variance > _ROUNDING * squares, variance, 0.0) ** 0.5
    )
    return spreads


def _deviations(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Values minus their mean; exactly 0 where all are equal."""
    from_first = np.array(values, np.float64) - values[0]
    deviations: npt.NDArray[np.float64] = from_first - from_first.mean()
    return deviations


def _format_variance(member: ScoredTrajectory) -> float:
    """Variance over the turns of the format reward, which the invalid turns alone are charged.

    A share p of the turns carries f / p each, the others 0: their variance is f^2 (1 / p - 1).
    """
    turns = member.trajectory.turns
    invalid = sum(not turn.valid for turn in turns)
    return member.reward.format**2 * (len(turns) / invalid - 1.0) if invalid else 0.0
