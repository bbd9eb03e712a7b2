"""How a weight rises or falls over the trainer steps (1-based), as pure functions.

| share of the full weight at step t | warm-up up to T, then 1 | decay up to T, then 0   |
|------------------------------------|-------------------------|-------------------------|
| cosine (SPEAR Eq. 13, Eq. 14)      | (1 - cos(pi t / T)) / 2 | (1 + cos(pi t / T)) / 2 |
| linear                             | t / T                   | 1 - t / T               |
| constant (T is not read)           | 1 always                | 1 always                |
"""

import math
from collections.abc import Callable, Mapping

from megatron_spear.config.method import Schedule


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


def linear_warmup(step: int, steps: int) -> float:
    """Share of the full weight at ``step``: t / T up to T, then 1; always 1 with T = 0.

    Example: T = 4 gives 0.25, 0.5, 0.75, 1, 1, ... for t = 1, 2, 3, 4, 5, ...
    """
    _check(step, steps)
    return 1.0 if step >= steps else step / steps


def linear_decay(step: int, steps: int) -> float:
    """Share of the full weight at ``step``: 1 - t / T up to T, then 0; always 0 with T = 0."""
    return 1.0 - linear_warmup(step, steps)


def constant(step: int, steps: int) -> float:
    """The full weight, 1, whatever the step and the horizon (0 too)."""
    _check(step, steps)
    return 1.0


WARMUPS: Mapping[Schedule, Callable[[int, int], float]] = {
    "constant": constant,
    "linear": linear_warmup,
    "cosine": cosine_warmup,
}
DECAYS: Mapping[Schedule, Callable[[int, int], float]] = {
    "constant": constant,
    "linear": linear_decay,
    "cosine": cosine_decay,
}


def _check(step: int, steps: int) -> None:
    assert step >= 0, f"steps count from 1 (0 = before the first), got {step}"
    assert steps >= 0, f"a horizon is 0 or more steps, got {steps}"
