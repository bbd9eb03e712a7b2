"""A sum that does not depend on the order of its terms, nor on how they are split."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def order_free_sum(parts: Sequence[npt.NDArray[np.floating]]) -> float:
    """The sum of all entries; bit-identical for every order and split of the same values.

    The n terms, m the greatest of their magnitudes, are rounded to multiples of the least power of
    two u for which all partial sums are below 2**53 u: float64 adds these without error, in any
    order. A term moves by at most u / 2 <= max(n, 2) * m * 2**-52, and not at all where it is a
    multiple of u (up to a million float32 terms that are all above m / 100 are). nan where a term
    is not finite. After Demmel and Nguyen, Fast Reproducible Floating-Point Summation (2013), with
    one level.

    Example: 1, -3 and 2**-60 have u = 2**-49; the last is rounded to 0 and the sum is -2.
    """
    bounds = [bound for part in parts if len(part) for bound in (part.max(), -part.min())]
    if not all(math.isfinite(bound) for bound in bounds):
        return math.nan
    digits = max(sum(map(len, parts)).bit_length(), 2)
    exponent = math.frexp(max(bounds, default=0.0))[1]
    # Of a number this large the last bit is u: adding it rounds, taking it away is exact.
    large = np.float64(math.ldexp(1.5, exponent + digits - 1))
    return float(sum(((part + large) - large).sum() for part in parts))
