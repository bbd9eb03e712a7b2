"""SPEAR's two cosine schedules as pure functions of the trainer step (1-based)."""

import math


def cosine_warmup(step: int, steps: int) -> float:
    """Share of the full weight at ``step``: (1 - cos(pi t / T)) / 2 up to T, then 1 (SPEAR Eq. 13).

    ``steps`` is T; with T = 0 there is no warm-up and the answer is always 1.
    Example: T = 4 gives 0.146, 0.5, 0.854, 1, 1, ... for t = 1, 2, 3, 4, 5, ...
    """
    _check(step, steps)
    if step >= steps:
        return 1.0
    return (1.0 - math.cos(math.pi * step / steps)) / 2.0


def cosine_decay(step: int, steps: int) -> float:
    """Share of the full weight at ``step``: (1 + cos(pi t / T)) / 2 up to T, then 0 (SPEAR Eq. 14).

    ``steps`` is T; with T = 0 nothing is ever left and the answer is always 0.
    Example: T = 4 gives 0.854, 0.5, 0.146, 0, 0, ... for t = 1, 2, 3, 4, 5, ...
    """
    _check(step, steps)
    if step >= steps:
        return 0.0
    return (1.0 + math.cos(math.pi * step / steps)) / 2.0


def _check(step: int, steps: int) -> None:
    assert step >= 0, f"steps count from 1 (0 = before the first), got {step}"
    assert steps >= 0, f"a horizon is 0 or more steps, got {steps}"
