"""The official replay buffer, its defects included, over plain rows (``compat: official``).

One trainer step calls ``take`` and then ``add``:

    take  | full?        count > 1.5 * capacity, else nothing is released
          | recalibrate  Eq. 2 with the means of *earlier* steps, or advantages times weight_decay
          | keep         padded-mean advantage > 0 (math) or >= 0 (agent); all rows with a decay
          | cut          a random power of two of the kept rows, in buffer order
          | clear        everything, also what was kept and not drawn
    add   | evict        chunks too far from the newest chunk in the buffer
          | history      drop whole oldest steps, append this step's group means and stds
          | insert       rows with padded-mean advantage > 0 (math: and with a tool call)

The default replay is in ``selection`` and ``store``. Where this one differs on purpose: staleness
is measured from the newest chunk, before insertion, and its limit is capped at 10 (defect 9);
a release clears the buffer and wastes up to half of the kept rows (defect 10). Group means and
rewards are those at collection, whatever the intrinsic weight is now (defect 15).
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from megatron_spear.algorithms.group_baselines import RewardArray
from megatron_spear.algorithms.official.advantages import groups, recalibrated_advantage
from megatron_spear.algorithms.official.filters import shuffled
from megatron_spear.replay.selection import FULL_FACTOR
from megatron_spear.replay.state import require_keys

Array = npt.NDArray[Any]
IndexArray = npt.NDArray[np.intp]
Permute = Callable[[int], IndexArray]
"""From a count n to a permutation of 0..n-1."""

MAX_TOLERATED_STEPS = 10
"""Larger staleness limits act as this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialReplayRules:
    """What differs between the official trees and their run scripts.

    ``tree``: ``math`` (a row is a trajectory, groups are consecutive blocks of ``group_size`` rows)
    or ``agent`` (a row is one environment step, groups are equal ``uid``). ``capacity`` N_D and
    ``max_history_groups`` N_DR count rows and group means; ``tolerate_steps`` is K in trainer
    steps. A ``weight_decay`` in (0, 1] replaces recalibration; other values turn it off. A release
    of fewer than ``min_released_rows`` (the official code's number of GPUs) is dropped.
    """

    tree: Literal["math", "agent"]
    capacity: int
    max_history_groups: int
    tolerate_steps: int
    group_size: int
    weight_decay: float = -1.0
    normalize_std: bool = False
    min_released_rows: int = 1

    @property
    def decays(self) -> bool:
        """Whether stored advantages are decayed rather than recalibrated."""
        return 0.0 < self.weight_decay <= 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialRows:
    """Rows of one step: ``row_ids``, ``uid`` and ``traj_uid`` (prompt and trajectory of a row),
    ``rewards``, ``has_tool_call`` ``[N]``; ``mask``, ``advantages`` ``[N, T]``, T the same in every
    step. ``row_ids`` are the caller's, who keeps the tokens; rewards are shaped totals, in the
    precision comparisons are made in. ValueError where the columns differ in length or rewards are
    no floats.
    """

    row_ids: Array
    uid: Array
    traj_uid: Array
    rewards: Array
    has_tool_call: npt.NDArray[np.bool_]
    mask: Array
    advantages: Array

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"official replay: columns differ in length: {lengths}")
        if not np.issubdtype(self.rewards.dtype, np.floating):
            raise ValueError(
                f"official replay: got rewards of {self.rewards.dtype}, expected floats (medians "
                "are rounded to the rewards' precision)"
            )

    def pick(self, rows: Array) -> Self:
        """The rows at these positions, or where a bool ``[N]`` is True, copied."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialRelease:
    """Released rows in buffer order, and what became of the others.

    ``advantages`` float64 ``[N, T]`` are recalibrated or decayed; ``baseline`` and ``scale`` are
    P50 of the historical group means and stds; ``num_kept`` rows passed the filter of
    ``num_stored``.
    """

    rows: OfficialRows
    advantages: RewardArray
    baseline: float
    scale: float
    num_stored: int
    num_kept: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _History:
    """Group means and stds, float64 ``[groups]``, of one step."""

    step: int
    means: Array
    stds: Array


class OfficialReplayBuffer:
    """Chunks of positive rows, at most one a step, and the history they are recalibrated with.

    Example: capacity 2 and a history of P50 0 with four stored rewards of 1: 4 > 1.5 * 2, so the
    next ``take`` releases min(largest power of two <= 4, 2) = 2 of them and forgets the other two.
    """

    def __init__(self, rules: OfficialReplayRules) -> None:
        self._rules = rules
        self._chunks: list[tuple[int, OfficialRows]] = []
        self._history: deque[_History] = deque()

    def __len__(self) -> int:
        """Stored rows, positive or not."""
        return sum(len(rows.row_ids) for _, rows in self._chunks)

    @property
    def decays(self) -> bool:
        """Whether stored advantages are decayed rather than recalibrated."""
        return self._rules.decays

    @property
    def row_ids(self) -> list[Any]:
        """Ids of the stored rows, in buffer order."""
        return [row for _, rows in self._chunks for row in rows.row_ids.tolist()]

    @property
    def steps(self) -> list[int]:
        """The step of each chunk."""
        return [step for step, _ in self._chunks]

    @property
    def group_means(self) -> list[tuple[int, list[float]]]:
        """(step, mean of each group), oldest first."""
        return [(entry.step, entry.means.tolist()) for entry in self._history]

    @property
    def group_stds(self) -> list[tuple[int, list[float]]]:
        """(step, std of each group), oldest first."""
        return [(entry.step, entry.stds.tolist()) for entry in self._history]

    def count(self) -> int:
        """What the capacity test counts: all rows with a decay, else rewards above P50.

        Both trees count strictly, also the one that keeps ties at release.
        """
        if self._rules.decays or not self._chunks:
            return len(self)
        rewards = np.concatenate([rows.rewards for _, rows in self._chunks])
        baseline = np.percentile(self._flat("means"), 50.0)
        return int((rewards > rewards.dtype.type(baseline)).sum())

    def is_full(self) -> bool:
        """Whether the next ``take`` empties the buffer."""
        return self.count() > FULL_FACTOR * self._rules.capacity

    def take(self, permute: Permute) -> OfficialRelease | None:
        """The replay batch if the buffer is full, which clears it; else None.

        None also where fewer rows than ``min_released_rows`` are drawn, the buffer being cleared
        all the same.
        """
        if not self.is_full():
            return None
        release = self._release(permute)
        self._chunks.clear()
        return release if len(release.rows.row_ids) >= self._rules.min_released_rows else None

    def add(self, step: int, rows: OfficialRows) -> None:
        """Evict stale chunks, update the history and insert the good rows of a step.

        ValueError where the rows do not form groups.
        """
        newest = self._chunks[-1][0] if self._chunks else step
        limit = min(self._rules.tolerate_steps, MAX_TOLERATED_STEPS)
        self._chunks = [chunk for chunk in self._chunks if abs(chunk[0] - newest) <= limit]
        self._remember(step, rows)
        good = rows.advantages.mean(1) > 0
        if self._rules.tree == "math":
            good &= rows.has_tool_call
        if good.any():
            self._chunks.append((step, rows.pick(good)))

    def state_dict(self) -> dict[str, Any]:
        """Chunks and history, oldest first (plain JSON); the official code saves neither."""
        return {
            "chunks": [{"step": step, "rows": _saved(rows)} for step, rows in self._chunks],
            "history": [
                {"step": entry.step, "means": _listed(entry.means), "stds": _listed(entry.stds)}
                for entry in self._history
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything; CheckpointError on other keys."""
        require_keys(state, ("chunks", "history"), "official replay")
        self._chunks = [(chunk["step"], _loaded(chunk["rows"])) for chunk in state["chunks"]]
        self._history = deque(
            _History(step=entry["step"], means=_array(entry["means"]), stds=_array(entry["stds"]))
            for entry in state["history"]
        )

    def _release(self, permute: Permute) -> OfficialRelease:
        stored = _concatenated([rows for _, rows in self._chunks])
        again = recalibrated_advantage(
            stored.rewards[:, None],
            stored.mask,
            self._flat("means"),
            self._flat("stds"),
            normalize_std=self._rules.normalize_std,
        )
        if self._rules.decays:
            advantages = stored.advantages.astype(np.float64) * self._rules.weight_decay
            keep = np.ones(len(advantages), np.bool_)
        else:
            advantages = again.advantages
            keep = again.keep if self._rules.tree == "math" else again.keep_ge
        kept = np.flatnonzero(keep)
        drawn = kept[power_of_two_cut(len(kept), self._rules.capacity, permute)]
        return OfficialRelease(
            rows=stored.pick(drawn),
            advantages=advantages[drawn],
            baseline=again.mean,
            scale=again.std,
            num_stored=len(keep),
            num_kept=len(kept),
        )

    def _remember(self, step: int, rows: OfficialRows) -> None:
        """Make room in the history, then append: it may exceed its limit by one step."""
        means, stds = group_statistics(rows, self._rules)
        while len(self._flat("means")) > self._rules.max_history_groups:
            self._history.popleft()
        self._history.append(_History(step=step, means=means, stds=stds))

    def _flat(self, name: Literal["means", "stds"]) -> Array:
        entries = [getattr(entry, name) for entry in self._history]
        return np.concatenate(entries) if entries else np.empty(0)


def group_statistics(rows: OfficialRows, rules: OfficialReplayRules) -> tuple[Array, Array]:
    """(means, stds) float64 ``[groups]`` of the rewards, masked rows included.

    math: consecutive blocks of ``group_size`` rows, whatever their prompt, with unbiased std, all
    in the rewards' precision. agent: the trajectories of each uid in order of first appearance,
    with biased std, in float64; a trajectory counts once, with the mean of its rows.
    """
    num_rows = len(rows.rewards)
    if not num_rows:
        raise ValueError("official replay: got a step without rows, expected at least one group")
    if rules.tree == "agent":
        rewards = rows.rewards.astype(np.float64)
        scores = [
            [rewards[index][own].mean() for own in groups(rows.traj_uid[index])]
            for index in groups(rows.uid)
        ]
        means, stds = (np.array([f(group) for group in scores]) for f in (np.mean, np.std))
        return means, stds
    if num_rows % rules.group_size:
        raise ValueError(
            f"official replay: got {num_rows} rows, expected whole groups of "
            f"{rules.group_size}; pass every row of the step, filtered ones with mask 0"
        )
    blocks = torch.from_numpy(rows.rewards).view(-1, rules.group_size)
    return blocks.mean(-1).double().numpy(), blocks.std(-1).double().numpy()


def power_of_two_cut(num_kept: int, capacity: int, permute: Permute) -> IndexArray:
    """Sorted positions of min(largest power of two <= num_kept, capacity) rows; none of one row.

    The rows are those whose position is among the first of the permutation.

    Example: of 7 rows the permutation 4, 3, 5, 0, 6, 2, 1 takes 0, 3, 4, 5, and three are wasted.
    """
    size = 0 if num_kept <= 1 else min(1 << (num_kept.bit_length() - 1), capacity)
    drawn: IndexArray = np.sort(np.asarray(permute(num_kept), np.intp)[:size])
    return drawn


def keyed_permutation(seed: int, step: int) -> Permute:
    """A permutation of any length that depends on (seed, step) alone."""
    return lambda count: shuffled(np.arange(count), seed, step, "official replay")


def _concatenated(chunks: list[OfficialRows]) -> OfficialRows:
    return OfficialRows(
        **{
            field.name: np.concatenate([getattr(rows, field.name) for rows in chunks])
            for field in fields(OfficialRows)
        }
    )


def _saved(rows: OfficialRows) -> dict[str, Any]:
    return {field.name: _listed(getattr(rows, field.name)) for field in fields(rows)}


def _loaded(saved: Mapping[str, Any]) -> OfficialRows:
    require_keys(saved, [field.name for field in fields(OfficialRows)], "official replay rows")
    return OfficialRows(**{name: _array(column) for name, column in saved.items()})


def _listed(array: Array) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "values": array.tolist()}


def _array(saved: Mapping[str, Any]) -> Array:
    return np.array(saved["values"], saved["dtype"])
