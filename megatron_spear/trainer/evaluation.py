"""Success on the fixed panel: one attempt a game, the same draws each time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spear.envs.family import Panel
from megatron_spear.rollout.rollouter import Rollouter

Won = tuple[bool | None, ...]
"""Games in the panel's order: won, lost, or None where the rollout failed, which says nothing."""


@dataclass(frozen=True)
class PanelResult:
    """One evaluation; a failed rollout is neither won nor lost and enters no share."""

    kinds: tuple[str, ...]
    won: Won
    wall_s: float

    @property
    def success(self) -> float:
        """Share won of the games that did not fail."""
        return share_won(self.won)

    @property
    def failed(self) -> int:
        """Games whose rollout failed."""
        return self.won.count(None)

    def by_kind(self) -> dict[str, float]:
        """``success`` by kind of task, where at least one game did not fail; {} without kinds."""
        by_kind: dict[str, list[bool]] = {}
        for kind, won in zip(self.kinds, self.won, strict=True):
            if kind and won is not None:
                by_kind.setdefault(kind, []).append(won)
        return {kind: share_won(tuple(own)) for kind, own in sorted(by_kind.items())}

    def metrics(self) -> dict[str, float]:
        """``eval/success``, ``eval/success_<kind>``, ``eval/failed``, ``time/eval_s``."""
        by_kind = {f"eval/success_{name}": value for name, value in self.by_kind().items()}
        return {
            "eval/success": self.success,
            "eval/failed": float(self.failed),
            "time/eval_s": self.wall_s,
            **by_kind,
        }


def evaluate(
    rollouter: Rollouter,
    panel: Panel,
    *,
    seed: int,
    temperature: float,
    progress: Callable[[int], None] | None = None,
) -> PanelResult:
    """Play every game of the panel once; raises what the first failed with if all of them failed.

    The draws are keyed by (``seed``, game, turn): the same weights give the same result.
    """
    started = time.perf_counter()
    groups = rollouter.collect_sync(
        panel.prompts,
        group_size=1,
        seed=(seed, 0),
        temperature=temperature,
        progress=progress,
    )
    return PanelResult(
        kinds=tuple(prompt.kind for prompt in panel.prompts),
        won=tuple(bool(g.members[0].won) if g.members else None for g in groups),
        wall_s=time.perf_counter() - started,
    )


def share_won(won: Won) -> float:
    """Share won of the games that did not fail. Example: (True, False, None) gives 0.5."""
    played = [w for w in won if w is not None]
    assert played, "a rollout in which everything failed raises"
    return sum(played) / len(played)


def paired_interval(
    before: Sequence[bool | None], after: Sequence[bool | None]
) -> tuple[float | None, float, float]:
    """Mean paired difference after - before and its 95 % normal interval: (mean, low, high).

    Pairs of which one game failed are left out. Example: 4 games, one newly won: mean 0.25,
    interval 0.25 -+ 1.96 * 0.25. One pair alone says nothing about the spread, so its interval is
    all that is possible, -1 to 1; without a pair the mean is None.
    """
    pairs = zip(before, after, strict=True)
    difference = np.array([float(b) - a for a, b in pairs if a is not None and b is not None])
    if not len(difference):
        return None, -1.0, 1.0
    mean = float(difference.mean())
    if len(difference) < 2:
        return mean, -1.0, 1.0
    half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return mean, mean - half, mean + half
