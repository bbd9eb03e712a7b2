"""Counter-based random numbers: a draw depends on its key alone, never on what was drawn before.

So resuming, splitting a batch or changing the parallel layout does not change what is drawn.
"""

import hashlib
import json

import numpy as np
import numpy.typing as npt

DrawArray = npt.NDArray[np.uint64]


def raw_draws(count: int, *key: int | str) -> DrawArray:
    """uint64 ``[count]``, uniform, a function of ``key``; entry t is the same for every count.

    The key (say seed, step, trajectory id) is hashed to the 128-bit key of a Philox counter
    generator (Salmon et al. 2011), whose raw stream numpy keeps stable between versions.
    """
    text = json.dumps(key, separators=(",", ":")).encode()
    words = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype="<u8")
    stream = np.random.Philox(key=words.astype(np.uint64))
    draws: DrawArray = stream.random_raw(count)
    return draws
