"""Prompts drawn over buckets, each bucket an endless order of its own with its own position."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.draws import raw_draws
from megatron_spear.data.prompts import PromptSource
from megatron_spear.errors import CheckpointError
from megatron_spear.types import Prompt

Choose = Callable[[npt.NDArray[np.float64]], Sequence[str]]
"""A bucket for each of some uniform numbers in [0, 1)."""


class BucketCursor:
    """The next prompts: ``choose`` says of which buckets, each of which goes on in its order.

    Every prompt of a bucket is consumed exactly once, in order, whatever is drawn. Draws are keyed
    by (``seed``, prompts consumed so far): a step may take more than once, and a resumed run draws
    the same.

    Example: with buckets a and b drawn as a, b, a, ``take(3)`` gives prompts 0 and 1 of a and 0 of
    b; ``state_dict()`` is then ``{"consumed": {"a": 2, "b": 1}}``.
    """

    def __init__(self, sources: Mapping[str, PromptSource], choose: Choose, seed: int) -> None:
        self._sources, self._choose, self._seed = dict(sources), choose, seed
        self.consumed = dict.fromkeys(sources, 0)

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; they count as consumed from now on."""
        draws = raw_draws(count, self._seed, "tasks", sum(self.consumed.values()))
        uniforms = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
        prompts = []
        for bucket in self._choose(uniforms):
            prompts.append(self._sources[bucket].at(self.consumed[bucket]))
            self.consumed[bucket] += 1
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """The position in each bucket."""
        return {"consumed": dict(self.consumed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved positions; CheckpointError where they are of other buckets."""
        saved = state["consumed"]
        if set(saved) != set(self._sources):
            raise CheckpointError(
                f"the saved prompt positions are of the buckets {sorted(saved)}, expected "
                f"{sorted(self._sources)}; put the games (env.games) of the run back"
            )
        self.consumed = {bucket: int(saved[bucket]) for bucket in self._sources}
