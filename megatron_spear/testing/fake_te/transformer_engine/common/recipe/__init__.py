"""FP8 recipes by TE's names: how values get their scales."""

from enum import Enum
from typing import Any, NamedTuple


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(Enum):
    """The number formats of the forward and of the backward pass."""

    E4M3 = _FormatHelper(448.0, 448.0)
    HYBRID = _FormatHelper(448.0, 57344.0)


class Recipe:
    """Base: keeps what it is given. ``block``: how many values share a scale, None = all."""

    block: int | None = None
    default_format = Format.HYBRID

    def __init__(self, fp8_format: Format | None = None, **settings: Any) -> None:
        self.fp8_format = fp8_format or self.default_format
        self.settings = {k: v for k, v in settings.items() if k == "margin"}

    def delayed(self) -> bool:
        """Whether scales come from earlier values."""
        return isinstance(self, DelayedScaling)

    def float8_current_scaling(self) -> bool:
        """Whether scales come from the present values, one a tensor."""
        return isinstance(self, Float8CurrentScaling)

    def float8_block_scaling(self) -> bool:
        """Whether blocks of 128 share a scale."""
        return isinstance(self, Float8BlockScaling)

    def mxfp8(self) -> bool:
        """Whether it is MXFP8."""
        return isinstance(self, MXFP8BlockScaling)


class DelayedScaling(Recipe):
    """A scale per tensor, from its amax at the last use."""


class Float8CurrentScaling(Recipe):
    """A scale per tensor, from its present amax."""


class Float8BlockScaling(Recipe):
    """A scale for 128 values of a row, and 128 x 128 of a weight."""

    block = 128
    default_format = Format.E4M3


class MXFP8BlockScaling(Recipe):
    """A power of two for 32 values of a row."""

    block = 32
    default_format = Format.E4M3
