"""Per-token estimators of KL(policy || reference) from the log-probs of sampled tokens.

With d = logprob - ref_logprob of a token drawn from the policy (Schulman, "Approximating KL
Divergence", joschu.net/blog/kl-approx.html):

| kind | value | mean over the policy's tokens |
|---|---|---|
| ``k1`` | d | the KL; a single value may be negative |
| ``abs`` | abs(d) | an upper bound of the KL |
| ``k2`` | d^2 / 2 | close to the KL where the policies are close |
| ``k3`` | exp(-d) - 1 + d | the KL, never negative |

The gradient is that of the value. Summed over sampled tokens it is not always the KL's own: the
mean gradient of k1 is 0 and that of k2 is the KL's, so k1 belongs in a reward and k2 in a loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_spear.errors import ConfigError

MAX_EXPONENT = 20.0
"""k3's exponent is clamped to plus and minus this, so that exp stays finite."""
MAX_K3 = 10.0
"""k3 itself is clamped to plus and minus this, so that one token cannot rule the sum."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """KL per token, of the shape of ``logprobs``; gradients reach both arguments.

    k3 has no gradient where one of its clamps acts. Raises ConfigError for an unknown kind.

    Example: logprob -1, reference -1.5 (d = 0.5): k1 0.5, abs 0.5, k2 0.125, k3 0.1065; their
    gradients with respect to the logprob are 1, 1, 0.5 and 0.3935.
    """
    if kind not in _ESTIMATORS:
        raise ConfigError(f"KL estimator: got {kind!r}, expected one of {', '.join(_ESTIMATORS)}")
    return _ESTIMATORS[kind](logprobs - ref_logprobs)


def _k3(difference: Tensor) -> Tensor:
    exponent = (-difference).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return (torch.expm1(exponent) - exponent).clamp(-MAX_K3, MAX_K3)


_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "abs": torch.abs,
    "k2": lambda d: d.square() / 2,
    "k3": _k3,
}
