"""Group filters of ``algorithm.compat: official``: by spread (RAGEN) and by equal rewards (DAPO).

They work on rows and return row numbers. ``keep="highest"`` keeps the groups that spread most,
``"lowest"`` those that spread least. Ties, which groups of equal rewards make often, go to the
earlier group of prompts, and among blocks to those that ``torch.topk`` names.
"""

import math
from collections.abc import Sequence, Sized
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from megatron_spear.algorithms.draws import raw_draws

Keep = Literal["highest", "lowest"]
RowArray = npt.NDArray[np.int64]
ScoreArray = npt.NDArray[np.float64]


def keep_spread_blocks(
    scores: npt.ArrayLike, group_size: int, fraction: float, keep: Keep = "highest"
) -> tuple[RowArray, dict[str, float]]:
    """Rows of floor(fraction * groups) groups by unbiased std, in row order, and metrics.

    ``scores`` is ``[groups * group_size]``, taken in float32; a group is a block of consecutive
    rows, whatever its prompt. Example: [0, 1, 5, 5] in twos with fraction 0.5 keeps rows 0 and 1.
    """
    blocks = torch.from_numpy(np.asarray(scores, np.float32)).view(-1, group_size)
    spreads = blocks.std(-1) if group_size > 1 else torch.zeros(len(blocks))
    ranked = (spreads if keep == "highest" else -spreads).topk(_count(spreads, fraction))
    chosen = ranked.indices.sort().values.numpy()
    rows = (chosen[:, None] * group_size + np.arange(group_size)).ravel()
    found = [group.numpy() for group in blocks.double()]
    return rows, _metrics(found, spreads.double().numpy(), chosen)


def keep_spread_prompts(
    scores: npt.ArrayLike,
    prompt_ids: Sequence[str],
    trajectory_ids: Sequence[str],
    fraction: float,
    keep: Keep = "highest",
) -> tuple[RowArray, tuple[str, ...], dict[str, float]]:
    """Rows (one a turn) of the prompts with the highest spread, those prompts, and metrics.

    All three inputs are ``[rows]``. A trajectory scores the mean of its rows, a prompt's spread is
    the population std of its trajectories' scores. Rows and prompts keep their order.
    """
    values = np.asarray(scores, np.float64)
    members: dict[str, dict[str, list[float]]] = {}
    for value, prompt, trajectory in zip(values, prompt_ids, trajectory_ids, strict=True):
        members.setdefault(prompt, {}).setdefault(trajectory, []).append(float(value))
    groups = [np.array([np.mean(rows) for rows in group.values()]) for group in members.values()]
    spreads = np.array([group.std() for group in groups])
    ranked = sorted(range(len(spreads)), key=spreads.__getitem__, reverse=keep == "highest")
    chosen = np.array(sorted(ranked[: _count(spreads, fraction)]), np.int64)
    names = tuple(members)
    prompts = tuple(names[index] for index in chosen)
    kept = frozenset(prompts)
    rows = [row for row, prompt in enumerate(prompt_ids) if prompt in kept]
    return np.array(rows, np.int64), prompts, _metrics(groups, spreads, chosen)


def shuffled(rows: npt.ArrayLike, *key: int | str) -> RowArray:
    """The rows in a random order that depends on ``key`` (say seed, step) alone."""
    rows = np.asarray(rows, np.int64)
    return rows[np.argsort(raw_draws(len(rows), *key), kind="stable")]


def power_of_two_cut(shuffled_rows: npt.ArrayLike) -> RowArray:
    """The first 2^k of the shuffled rows, k as large as possible but not 0, back in row order.

    Example: [6, 7, 5, 9, 8, 10, 4] keeps the first four: [5, 6, 7, 9]. A single row is not kept.
    """
    rows = np.asarray(shuffled_rows, np.int64)
    count = 1 << (len(rows).bit_length() - 1) if len(rows) > 1 else 0
    return np.sort(rows[:count])


def drop_equal_blocks(
    rewards: npt.ArrayLike, group_size: int, *, last_try: bool = False
) -> RowArray:
    """Rows of the groups whose rewards are not all equal; every row on the last try.

    ``rewards`` is ``[groups * group_size]``, a group a block. Example: [1, 1, 0, 1] in twos keeps
    rows 2 and 3.
    """
    blocks = np.asarray(rewards, np.float64).reshape(-1, group_size)
    useful = (blocks != blocks[:, :1]).any(axis=1) | last_try
    return np.flatnonzero(np.repeat(useful, group_size))


def _count(groups: Sized, fraction: float) -> int:
    """How many groups stay; the product is floored as floating point has it."""
    return math.floor(fraction * len(groups))


def _metrics(
    groups: Sequence[ScoreArray], spreads: ScoreArray, chosen: RowArray
) -> dict[str, float]:
    """For all groups and for the chosen; {} for none.

    Means over groups of the spread, the best score (``best_mean``) and the mean score
    (``score_mean``), and the highest mean score of any group (``score_max``).
    """
    best, means = (np.array([f(group) for group in groups]) for f in (np.max, np.mean))
    found: dict[str, float] = {}
    for name, some in (("", np.arange(len(groups))), ("kept_", chosen)):
        if len(some):
            found[f"filter/{name}spread_mean"] = float(spreads[some].mean())
            found[f"filter/{name}best_mean"] = float(best[some].mean())
            found[f"filter/{name}score_mean"] = float(means[some].mean())
            found[f"filter/{name}score_max"] = float(means[some].max())
    return found
