"""Prompts drawn over buckets, each bucket an endless order of its own with its own position."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.draws import raw_draws
from megatron_spear.data.prompts import Cursor, PromptSource
from megatron_spear.errors import CheckpointError
from megatron_spear.types import Prompt

Choose = Callable[[npt.NDArray[np.float64]], Sequence[str]]
"""A bucket for each of some uniform numbers in [0, 1)."""


class BucketCursor(Cursor):
    """The next prompts: ``choose`` says of which buckets, each of which goes on in its order.

    Every prompt of a bucket is consumed exactly once, in order, whatever is drawn. Draws are keyed
    by (``seed``, prompts consumed so far): a step may take more than once, and a resumed run draws
    the same.

    Example: with buckets a and b drawn as a, b, a, ``take(3)`` gives prompts 0 and 1 of a and 0 of
    b; ``state_dict()`` is then ``{"consumed": {"a": 2, "b": 1}}`` where they are made on demand.
    """

    def __init__(self, sources: Mapping[str, PromptSource], choose: Choose, seed: int) -> None:
        super().__init__(_sha256(sources))
        self._sources, self._choose, self._seed = dict(sources), choose, seed
        self.consumed = dict.fromkeys(sources, 0)

    def claim(self, count: int) -> list[list[Any]]:
        """``[bucket, position]`` of the next ``count`` prompts."""
        draws = raw_draws(count, self._seed, "tasks", sum(self.consumed.values()))
        uniforms = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
        claimed = []
        for bucket in self._choose(uniforms):
            claimed.append([bucket, self.consumed[bucket]])
            self.consumed[bucket] += 1
        return claimed

    def at(self, position: Sequence[Any]) -> Prompt:
        """The prompt at ``[bucket, position]``."""
        bucket, number = position
        return self._sources[bucket].at(number)

    def position(self) -> dict[str, Any]:
        """The position in each bucket."""
        return {"consumed": dict(self.consumed)}

    def move(self, position: dict[str, Any]) -> None:
        """Continue from saved positions; CheckpointError where they are of other buckets."""
        saved = position["consumed"]
        if set(saved) != set(self._sources):
            raise CheckpointError(
                f"the saved prompt positions are of the buckets {sorted(saved)}, expected "
                f"{sorted(self._sources)}; put the games (env.games) of the run back"
            )
        self.consumed = {bucket: int(saved[bucket]) for bucket in self._sources}


def _sha256(sources: Mapping[str, PromptSource]) -> str | None:
    """Of the buckets that are lists, in order; None where there is none."""
    found = {bucket: source.sha256 for bucket, source in sources.items()}
    lists = [[bucket, sha256] for bucket, sha256 in found.items() if sha256 is not None]
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest() if lists else None
