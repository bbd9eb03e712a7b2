"""What selection may know of the stored rows, as columns: one entry a row, oldest first."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
RewardColumn = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayIndex:
    """Columns ``[N]`` over the rows that may be taken; the tokens stay on disk.

    ``row_ids`` count insertions. ``policy_versions`` are the oldest among a row's tokens.
    ``outcome``, ``intrinsic`` and ``format`` are the parts of its reward, ``advantages`` its mean
    advantage at collection. ``num_tokens`` counts all tokens of its segments. ``prompt_keys`` and
    ``trajectory_keys`` are 64-bit hashes of the prompt id and of the trajectory id: rows of one
    prompt share the first, draws are keyed by the second.
    """

    row_ids: IntArray
    policy_versions: IntArray
    outcome: RewardColumn
    intrinsic: RewardColumn
    format: RewardColumn
    advantages: RewardColumn
    num_tokens: IntArray
    prompt_keys: npt.NDArray[np.uint64]
    trajectory_keys: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.row_ids)

    def rewards(self, intrinsic_weight: float) -> RewardColumn:
        """float64 ``[N]``: shaped rewards at the given intrinsic weight (SPEAR Eq. 6)."""
        return self.outcome + intrinsic_weight * self.intrinsic + self.format

    def pick(self, rows: npt.NDArray[Any]) -> "ReplayIndex":
        """The rows at these positions, or where a bool ``[N]`` is True."""
        return ReplayIndex(**{name: getattr(self, name)[rows] for name in self.__slots__})


def key_of(text: str) -> int:
    """The 64-bit key of a prompt id or of a trajectory id as text (blake2b, little endian)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
