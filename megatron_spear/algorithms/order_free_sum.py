"""A sum that does not depend on the order of its terms, nor on how they are split."""

import math

import numpy as np
import numpy.typing as npt

_BITS = 46
_CHUNK = 2**16  # of this many terms below 2**46 the sum stays below 2**62: no int64 overflows


def order_free_sum(values: npt.NDArray[np.floating]) -> float:
    """The sum of float ``[T]``; bit-identical for every order of the same values.

    Each term is cut to a multiple of u, the power of two with 2**45 u <= max abs(value) < 2**46 u
    (2**-1000 if that is less), and these are added as integers, exactly. So the result is less than
    T u <= T * 2**-45 * max abs(value) from the true sum, but for its last bit; float32 values down
    to 2**-22 of the greatest are multiples of u and add no error at all. nan where a term is not
    finite.

    Example: 1 and -3 have u = 2**-44 and the sum -2, exactly.
    """
    if not len(values):
        return 0.0
    greatest = max(float(values.max()), -float(values.min()))
    if not math.isfinite(greatest):
        return math.nan
    shift = min(_BITS - math.frexp(greatest)[1], 1000)  # 2.0**shift is finite
    total = 0
    for start in range(0, len(values), _CHUNK):
        scaled = values[start : start + _CHUNK] * np.float64(2.0**shift)
        total += int(scaled.astype(np.int64).sum())
    return math.ldexp(total, -shift)
