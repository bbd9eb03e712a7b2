"""Counter-based random numbers: a draw depends on its key alone, never on what was drawn before.

So resuming, splitting a batch or changing the parallel layout does not change what is drawn.
"""

import hashlib
import json
import math

import numpy as np
import numpy.typing as npt

DrawArray = npt.NDArray[np.uint64]
_Indices = npt.NDArray[np.intp]


def raw_draws(count: int, *key: int | str) -> DrawArray:
    """uint64 ``[count]``, uniform, a function of ``key``; entry t is the same for every count.

    The key (say seed, step, trajectory id) is hashed to the 128-bit key of a Philox counter
    generator (Salmon et al. 2011), whose raw stream numpy keeps stable between versions.
    """
    words = np.frombuffer(_digest(key, 16), dtype="<u8")
    stream = np.random.Philox(key=words.astype(np.uint64))
    draws: DrawArray = stream.random_raw(count)
    return draws


def stream_key(*key: int | str) -> int:
    """The 64-bit key of a stream of ``stream_draws``."""
    return int.from_bytes(_digest(key, 8), "little")


def stream_draws(keys: DrawArray, counters: npt.NDArray[np.integer]) -> DrawArray:
    """uint64 ``[T]``, uniform; entry i is a function of ``keys[i]`` and ``counters[i]`` alone.

    For many streams of which few entries are wanted: SplitMix64 (Steele et al. 2014), whose k-th
    number is a mix of key + (k + 1) * odd constant, so any of them costs the same.
    """
    mixed: DrawArray = (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed += keys
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def smallest(draws: DrawArray, count: int) -> _Indices:
    """Indices ``[count]`` of the smallest draws, in no particular order: a uniform choice.

    Only draws below a bound that almost surely has ``count`` of them under it are compared.
    """
    bound = (count + 8.0 * math.sqrt(count) + 8.0) / max(len(draws), 1)
    few = np.flatnonzero(draws < np.uint64(bound * 2.0**64)) if bound < 1.0 else np.array([], int)
    if len(few) < count:
        few = np.arange(len(draws))
    if count in (0, len(few)):
        return few[:count]
    chosen: _Indices = few[np.argpartition(draws[few], count - 1)[:count]]
    return chosen


def _digest(key: tuple[int | str, ...], size: int) -> bytes:
    text = json.dumps(key, separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=size).digest()
