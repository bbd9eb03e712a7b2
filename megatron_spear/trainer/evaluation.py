"""Success on the fixed panel, the same draws each time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spear.config.schema import EvaluationSection
from megatron_spear.envs.family import Panel
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.tracking.evaluations import share_won
from megatron_spear.types import TrajectoryGroup

Won = tuple[float | None, ...]
"""Games in the panel's order: the share of attempts won (one attempt: 1 or 0), or None where all
of them failed, which says nothing."""


@dataclass(frozen=True)
class PanelResult:
    """One evaluation; a failed attempt (there are ``failed``) is neither won nor lost and enters no
    share."""

    kinds: tuple[str, ...]
    won: Won
    failed: int
    wall_s: float

    @property
    def success(self) -> float:
        """Mean share won over the games that have one."""
        return share_won(self.won)

    @property
    def num_games(self) -> int:
        """Games that have a share won."""
        return len(self.won) - self.won.count(None)

    def by_kind(self) -> dict[str, float]:
        """``success`` by kind of task, of games that have a share won; {} without kinds."""
        by_kind: dict[str, list[float]] = {}
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
    section: EvaluationSection,
    progress: Callable[[int], None] | None = None,
) -> PanelResult:
    """``play`` the panel; what it came to."""
    started = time.perf_counter()
    groups = play(rollouter, panel, section=section, progress=progress)
    return PanelResult(
        kinds=tuple(prompt.kind for prompt in panel.prompts),
        won=tuple(_share_of(group) for group in groups),
        failed=sum(len(group.failures) for group in groups),
        wall_s=time.perf_counter() - started,
    )


def play(
    rollouter: Rollouter,
    panel: Panel,
    *,
    section: EvaluationSection,
    progress: Callable[[int], None] | None = None,
) -> list[TrajectoryGroup]:
    """Play every game of the panel ``section.attempts`` times, one group a game; raises what the
    first attempt failed with if all of them failed.

    The draws are keyed by (``section.seed``, game, attempt, turn): the same weights give the same
    result, and the first attempts are the same however many there are.
    """
    return rollouter.collect_sync(
        panel.prompts,
        group_size=section.attempts,
        seed=(section.seed, 0),
        temperature=section.temperature,
        top_p=section.top_p,
        progress=progress,
    )


def _share_of(group: TrajectoryGroup) -> float | None:
    """Share won of the attempts at one game; None where all of them failed."""
    if not group.members:
        return None
    return sum(member.won for member in group.members) / len(group.members)


def paired_interval(
    before: Sequence[float | None], after: Sequence[float | None]
) -> tuple[float | None, float, float]:
    """Mean paired difference after - before and its 95 % normal interval: (mean, low, high).

    Pairs of which one has no share are left out. Example: 4 games, one newly won: mean 0.25,
    interval 0.25 -+ 1.96 * 0.25. One pair alone says nothing about the spread, so its interval is
    all that is possible, -1 to 1; without a pair the mean is None.
    """
    pairs = zip(before, after, strict=True)
    difference = np.array([float(b - a) for a, b in pairs if a is not None and b is not None])
    if not len(difference):
        return None, -1.0, 1.0
    mean = float(difference.mean())
    if len(difference) < 2:
        return mean, -1.0, 1.0
    half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return mean, mean - half, mean + half
