"""The proof that training sees what the engine was given and sampled, token by token."""

import itertools
from collections.abc import Sequence

import numpy as np

from megatron_spear.errors import EngineError
from megatron_spear.types import Segment, TokenArray


class TokenDrift(EngineError):
    """What would be trained on is not what the engine saw; ``num_tokens`` differ."""

    def __init__(self, name: str, num_tokens: int) -> None:
        super().__init__(
            f"{num_tokens} tokens of trajectory {name} differ from what the engine was given and "
            "sampled; it is not trained on: please report this with the model's chat template"
        )
        self.num_tokens = num_tokens


class SeenTokens:
    """What an engine was given and sampled in one attempt, noted as it happens.

    Nothing of it comes from the records that are trained on, so that it can be held against them.
    """

    def __init__(self) -> None:
        self._contexts: list[TokenArray] = []
        self._drift = 0

    def note(self, given: TokenArray, sampled: TokenArray, *, begins_segment: bool) -> None:
        """One request's tokens ``[P]`` and its answer's ``[A]``."""
        if begins_segment:
            self._contexts.append(np.zeros(0, np.int32))
        before = self._contexts[-1]
        self._drift += _differing(given[: len(before)], before)
        self._contexts[-1] = np.concatenate([given, sampled])

    def drift(self, segments: Sequence[Segment]) -> int:
        """How many tokens of the segments are others than those that were noted.

        Example: given ``[5, 6]``, sampled ``[9]``; a segment ``[5, 7, 9, 2]`` has 2: one differs,
        one is too many.
        """
        pairs = itertools.zip_longest([s.token_ids for s in segments], self._contexts)
        return self._drift + sum(_differing(kept, seen) for kept, seen in pairs)


def _differing(one: TokenArray | None, other: TokenArray | None) -> int:
    one, other = (np.zeros(0, np.int32) if tokens is None else tokens for tokens in (one, other))
    size = min(len(one), len(other))
    return int(np.sum(one[:size] != other[:size])) + abs(len(one) - len(other))
