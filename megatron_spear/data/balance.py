"""Which sample goes to which data-parallel rank and micro-batch: a pure function of the lengths.

The ranks wait for each other once an optimizer step, so their costs should be equal; a pipeline
needs the same number of micro-batches on each; and a micro-batch has room for a fixed number of
tokens, of which few should stay empty. Costs count attention, which grows with the square of a
length. In three steps:

1. Fill: best fit decreasing gives the number of micro-batches, rounded up to a multiple of the
   ranks. Samples, longest first, then go to the micro-batch of least cost, or where that leaves no
   room, of fewest tokens. (Where mixing lengths costs padding: runs of like lengths instead.)
2. Deal: the differencing method for balanced number partitioning (Michiels, Korst, Aarts,
   van Leeuwen, STACS 2003), an equal number of micro-batches each by construction.
3. Swap samples between the most expensive rank and cheaper ones while that helps.
"""

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

ATTENTION_LENGTH = 4096
"""Length in tokens at which attention is taken to cost as much as the linear layers."""

EVEN = 1.01
"""Cost of the most expensive rank over the mean at which swapping stops."""

MAX_SWAPS = 10
"""Swaps a rank, and ``MAX_SEARCHED`` samples a rank: bounds on the time, not on what is right."""

MAX_SEARCHED = 256

Plan = tuple[tuple[tuple[int, ...], ...], ...]
"""``plan[d][m]``: indices of the samples of data-parallel rank d's m-th micro-batch."""

_Bins = list[list[int]]


def token_cost(length: int) -> int:
    """What a sequence costs, in units of 1 / ATTENTION_LENGTH of a token's linear layers.

    Example: 4,096 tokens cost ``2 * 4096 * 4096``: as much attention as linear layers.
    """
    return length * (ATTENTION_LENGTH + length)


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    data_parallel: int,
    tokens_per_microbatch: int,
    mix_lengths: bool,
    microbatch_multiple: int = 1,
) -> Plan:
    """Every sample once, the same number of micro-batches on each rank, ranks of like cost.

    A micro-batch has at most ``tokens_per_microbatch`` tokens unless one sample alone is longer; it
    is empty only where there are fewer samples than micro-batches. Their number on a rank is a
    multiple of ``microbatch_multiple``. Each rank's micro-batches are in
    falling order of cost, and so are the samples of each. Without ``mix_lengths`` a micro-batch is
    a run of the samples sorted by length. Samples of the same length may change places, nothing
    else depends on the order of ``lengths``.

    Example: lengths ``[6, 1, 4, 3, 2]``, two ranks, 8 tokens: 16 tokens fill two micro-batches,
    ``(((0, 4),), ((2, 3, 1),))``, of lengths 6, 2 and 4, 3, 1. In runs of like lengths it takes
    four, ``(((0,), (4, 1)), ((2,), (3,)))``.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    falling = [lengths[i] for i in order]
    costs = [token_cost(length) for length in falling]
    fill = _fill_mixed if mix_lengths else _fill_runs
    bins = fill(falling, costs, tokens_per_microbatch, data_parallel * microbatch_multiple)
    ranks = _deal(bins, costs, data_parallel)
    if mix_lengths:
        ranks = _swap(ranks, falling, costs, tokens_per_microbatch)
    for rank in ranks:
        rank.sort(key=lambda group: (-_total(group, costs), group))
    return tuple(tuple(tuple(order[i] for i in group) for group in rank) for rank in ranks)


def _total(group: Sequence[int], values: Sequence[int]) -> int:
    return sum(values[i] for i in group)


def up_to(count: int, multiple: int) -> int:
    """The smallest multiple that is not below ``count``."""
    return -(-count // multiple) * multiple


def _fill_mixed(lengths: list[int], costs: list[int], limit: int, multiple: int) -> _Bins:
    """A multiple of ``multiple`` bins, about equal in cost if there is room, else in tokens."""
    best = _best_fit(lengths, limit)
    target = up_to(len(best), multiple)
    for weights in (costs, lengths):
        bins = _spread(lengths, weights, limit, target)
        if bins is not None:
            return bins
    return _split(best, costs, target)


def _best_fit(lengths: list[int], limit: int) -> _Bins:
    """Each sample into the fullest bin with room for it, a new one if there is none."""
    bins: _Bins = []
    rooms: list[tuple[int, int]] = []  # (tokens free, bin), rising
    for position, length in enumerate(lengths):
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, number = limit, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(position)
        insort(rooms, (room - length, number))
    return bins


def _spread(lengths: list[int], weights: list[int], limit: int, count: int) -> _Bins | None:
    """Each sample into the bin of least weight; None if that leaves one without room.

    A bin is closed when it is its turn and the sample does not fit.
    """
    bins: _Bins = [[] for _ in range(count)]
    rooms = [limit] * count
    heap = [(0, number) for number in range(count)]
    for position, length in enumerate(lengths):
        while heap and rooms[heap[0][1]] < length and bins[heap[0][1]]:
            heapq.heappop(heap)
        if not heap:
            return None
        weight, number = heap[0]
        bins[number].append(position)
        rooms[number] -= length
        heapq.heapreplace(heap, (weight + weights[position], number))
    return bins


def _fill_runs(lengths: list[int], costs: list[int], limit: int, multiple: int) -> _Bins:
    """A multiple of ``multiple`` runs of consecutive samples, the most expensive as cheap as
    possible."""
    tokens, spent = [0, *accumulate(lengths)], [0, *accumulate(costs)]
    target = up_to(len(_runs(tokens, spent, limit, spent[-1])), multiple)
    cap = bisect_left(
        range(spent[-1]),
        True,
        lo=spent[-1] // target,
        key=lambda cap: len(_runs(tokens, spent, limit, cap)) <= target,
    )
    return _split(_runs(tokens, spent, limit, cap), costs, target)


def _runs(tokens: list[int], spent: list[int], limit: int, cap: int) -> _Bins:
    """Greedy runs of at most ``limit`` tokens and ``cap`` cost, one sample at least, from the sums
    of tokens and costs up to each sample."""
    ends = [0]
    while ends[-1] < len(tokens) - 1:
        start = ends[-1]
        room = bisect_right(tokens, tokens[start] + limit) - 1
        paid = bisect_right(spent, spent[start] + cap) - 1
        ends.append(max(min(room, paid), start + 1))
    return [list(range(start, end)) for start, end in pairwise(ends)]


def _split(bins: _Bins, costs: list[int], count: int) -> _Bins:
    """The most expensive bins halved, until there are ``count``; empty ones if all have one."""
    bins = list(bins)
    while len(bins) < count:
        widest = max(range(len(bins)), key=lambda b: (len(bins[b]) > 1, _total(bins[b], costs)))
        group = bins.pop(widest) if len(bins[widest]) > 1 else []
        half = len(group) // 2
        bins += [group[:half], group[half:]] if group else [[]]
    return bins


def _deal(bins: _Bins, costs: list[int], ranks: int) -> list[_Bins]:
    """The same number of bins to each rank.

    Bins sorted by cost, ``ranks`` at a time, are partial solutions of one bin a rank. The two of
    widest spread are joined, the expensive ranks of one with the cheap ranks of the other, until
    one is left. Joined are costs ``[9, 5]`` and ``[4, 1]`` to ``[9 + 1, 5 + 4]``.
    """
    totals = np.array([_total(group, costs) for group in bins], np.int64)
    rows = np.argsort(-totals, kind="stable").reshape(-1, ranks)
    heap = []  # (- spread, number, costs [ranks] falling, bins [m, ranks])
    for number, row in enumerate(rows):
        heap.append((_spread_of(totals[row]), number, totals[row], row[None]))
    heapq.heapify(heap)
    for number in range(len(rows), 2 * len(rows) - 1):
        _, _, first, first_bins = heapq.heappop(heap)
        _, _, second, second_bins = heapq.heappop(heap)
        joined = first + second[::-1]
        order = np.argsort(-joined, kind="stable")
        members = np.concatenate([first_bins, second_bins[:, ::-1]])[:, order]
        heapq.heappush(heap, (_spread_of(joined[order]), number, joined[order], members))
    return [[bins[b] for b in column] for column in heap[0][3].T]


def _spread_of(falling: np.ndarray) -> int:
    return int(falling[-1] - falling[0])


def _swap(ranks: list[_Bins], lengths: list[int], costs: list[int], limit: int) -> list[_Bins]:
    """The plan after swaps that make the most expensive rank cheaper, none dearer than it was."""
    size, cost = np.array(lengths, np.int64), np.array(costs, np.int64)
    groups = [group for rank in ranks for group in rank]
    bin_of = np.empty(len(lengths), np.int64)
    for number, group in enumerate(groups):
        bin_of[group] = number
    room = np.array([limit - _total(group, lengths) for group in groups], np.int64)
    rank_of = np.repeat(np.arange(len(ranks)), len(ranks[0]))
    spent = np.bincount(rank_of[bin_of], cost, len(ranks))
    for _ in range(MAX_SWAPS * len(ranks)):
        top = int(spent.argmax())
        if spent[top] <= EVEN * spent.mean():
            break
        owner = rank_of[bin_of]
        for other in np.argsort(spent, kind="stable"):
            found = _best_swap(
                np.flatnonzero(owner == top),
                np.flatnonzero(owner == other),
                cost,
                size,
                room[bin_of],
                spent[top] - spent[other],
            )
            if found:
                break
        else:
            break
        given, taken = found
        room[bin_of[[given, taken]]] += np.array([1, -1]) * (size[given] - size[taken])
        spent[[top, other]] += np.array([-1, 1]) * (cost[given] - cost[taken])
        bin_of[[given, taken]] = bin_of[[taken, given]]
    for number in range(len(groups)):
        groups[number] = np.flatnonzero(bin_of == number).tolist()
    each = len(ranks[0])
    return [groups[start : start + each] for start in range(0, len(groups), each)]


def _best_swap(
    ours: np.ndarray,
    theirs: np.ndarray,
    cost: np.ndarray,
    size: np.ndarray,
    room: np.ndarray,
    gap: float,
) -> tuple[int, int] | None:
    """The sample of ``ours`` and that of ``theirs`` whose swap halves ``gap`` best; None if no
    swap makes it smaller. ``room`` ``[n]`` is that of each sample's micro-batch."""
    ours = ours[:: 1 + len(ours) // MAX_SEARCHED]
    theirs = theirs[:: 1 + len(theirs) // MAX_SEARCHED]
    change = cost[ours][:, None] - cost[theirs]
    fits = size[ours][:, None] - size[theirs] <= room[theirs]
    away = np.where((change > 0) & (change < gap) & fits, np.abs(change - gap / 2), np.inf)
    if not np.isfinite(away).any():
        return None
    first, second = np.unravel_index(int(away.argmin()), away.shape)
    return int(ours[first]), int(theirs[second])
