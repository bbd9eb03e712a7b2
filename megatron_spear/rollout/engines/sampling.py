"""Drawing tokens with counter-based randomness, so that batching never changes what is drawn.

The uniform number of a token depends on the request's seed and the token's place in the generation,
on nothing else: not on the slot, the batch, nor what ran before.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def seed_key(seed: Sequence[int] | int) -> int:
    """The 64-bit key of a seed tuple; ``(1, 23)`` and ``(12, 3)`` differ. An int is its own key."""
    if isinstance(seed, int):
        return seed
    text = ",".join(str(int(part)) for part in seed)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def signed_key(key: int) -> int:
    """A key as the signed 64-bit number that SGLang's ``sampling_seed`` is."""
    return key - (1 << 64) if key >> 63 else key


def key_of_signed(seed: int) -> int:
    """The key that travelled as ``sampling_seed``, -2^63 to 2^63 - 1."""
    return seed % (1 << 64)


def uniforms(
    keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """Uniform numbers float64 ``[B]`` in the open (0, 1) for keys and counters uint64 ``[B]``.

    SplitMix64 (Steele, Lea, Flood 2014) as a counter-based generator: output ``counter`` of the
    stream that starts at ``key``. 32 bits are kept, centred, so that 0 and 1 are never drawn.
    """
    z: npt.NDArray[np.uint64] = keys + (counters + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    z = z ^ (z >> np.uint64(31))
    high = (z >> np.uint64(32)).astype(np.float64)
    return np.asarray((high + 0.5) * 2.0**-32)


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    draws: torch.Tensor,
    top_ps: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token a row: tokens int64 ``[B]``, log-probs float32 ``[B]``, finite bool ``[B]``.

    ``logits`` ``[B, V]``, ``temperatures`` float32 ``[B]`` (0 = greedy, log-probs of the raw
    distribution), ``draws`` float64 ``[B]`` in (0, 1). The token is the inverse of the cumulative
    distribution at the draw. A row with ``finite`` False had NaN or infinite logits: do not use it.
    ``top_ps`` float64 ``[B]`` in (0, 1] (None = 1 everywhere) draws from the nucleus, with the
    log-prob of the whole distribution; rows of 1 are drawn as without it.

    Example: probabilities ``[0.2, 0.5, 0.3]`` and draw 0.6 give token 1 (0.2 <= 0.6 < 0.7); with
    top_p 0.6 tokens 1 and 2 are left, token 1 for draws below 0.625.
    """
    logits = logits.float()
    finite = torch.isfinite(logits).all(-1)
    greedy = temperatures == 0
    scale = torch.where(greedy, 1.0, temperatures)
    logprobs = torch.log_softmax(logits / scale[:, None], -1)
    # float64: a float32 sum over a large vocabulary would shift the boundaries between tokens.
    probabilities = logprobs.exp()
    if top_ps is not None:
        probabilities = torch.where(
            top_ps[:, None] < 1, _nucleus(probabilities, top_ps), probabilities
        )
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    tokens = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
    if bool(greedy.any()):
        tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], finite


def _nucleus(probabilities: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """``probabilities`` ``[B, V]`` with 0 outside the fewest likeliest tokens that reach top_p.

    The likeliest one is always in; of equal ones the first comes first.
    """
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    kept = torch.where(before < top_ps[:, None], ordered, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, tokens, kept)
