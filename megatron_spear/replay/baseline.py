"""The history of group-mean rewards replayed rewards are compared with (SPEAR's D_R, Eq. 2)."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_spear.replay.state import require_keys
from megatron_spear.types import Reward, ScoredGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMean:
    """One group's mean reward, in parts, so that it can be weighed anew."""

    step: int
    prompt_id: str
    reward: Reward


_PARTS = ("outcome", "intrinsic", "format")
_COLUMNS = ("step", "prompt_id", *_PARTS)


class BaselineHistory:
    """The last ``max_groups`` group means, the oldest leaving first.

    Means are kept in parts because mu(t) decays: the official code stores shaped rewards, so old
    groups look better than later ones of equal outcome and the comparison is biased.

    Example: groups with (outcome, intrinsic) means (1, 0), (0, 0.4), (0, 0) have P50 0 at mu = 0
    and 0.4 at mu = 1.
    """

    def __init__(self, max_groups: int) -> None:
        self._means: deque[GroupMean] = deque(maxlen=max_groups)

    def __len__(self) -> int:
        return len(self._means)

    def extend(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Append one entry for each group with members; each member counts once."""
        for group in groups:
            if group.members:
                self._means.append(_mean(step, group))

    def p50(self, intrinsic_weight: float) -> float:
        """Median of the group means at the current intrinsic weight (linear interpolation)."""
        assert self._means, "the history is updated with the step's groups before it is read"
        totals = [mean.reward.total(intrinsic_weight) for mean in self._means]
        return float(np.percentile(totals, 50))

    def state_dict(self) -> dict[str, Any]:
        """The entries as columns, oldest first (plain JSON)."""
        columns: dict[str, Any] = {
            name: [getattr(mean.reward, name) for mean in self._means] for name in _PARTS
        }
        columns["step"] = [mean.step for mean in self._means]
        columns["prompt_id"] = [mean.prompt_id for mean in self._means]
        return columns

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all entries; CheckpointError on other keys."""
        require_keys(state, _COLUMNS, "replay baseline")
        rows = zip(*(state[name] for name in _COLUMNS), strict=True)
        self._means.clear()
        self._means.extend(
            GroupMean(
                step=step,
                prompt_id=prompt_id,
                reward=Reward(**dict(zip(_PARTS, parts, strict=True))),
            )
            for step, prompt_id, *parts in rows
        )


def _mean(step: int, group: ScoredGroup) -> GroupMean:
    rewards = [member.reward for member in group.members]
    means = {part: sum(getattr(r, part) for r in rewards) / len(rewards) for part in _PARTS}
    return GroupMean(step=step, prompt_id=group.prompt.prompt_id, reward=Reward(**means))
