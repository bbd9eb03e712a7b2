"""Success on the fixed panel: one attempt a game, the same draws each time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_spear.envs.alfworld.task import Panel, success_by_type


@dataclass(frozen=True)
class PanelResult:
    """Wins by game in the panel's order; a failed rollout counts as lost here and in ``failed``."""

    prompt_ids: tuple[str, ...]
    won: tuple[bool, ...]
    failed: int
    wall_s: float

    @property
    def success(self) -> float:
        """Share of games won."""
        return sum(self.won) / len(self.won)

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """``eval/success``, ``eval/success_<task type>``, ``eval/failed``."""
        by_type = success_by_type({p: [w] for p, w in zip(self.prompt_ids, self.won, strict=True)})
        metrics = {f"{prefix}/success_{name}": value for name, value in by_type.items()}
        return {
            f"{prefix}/success": self.success,
            f"{prefix}/failed": float(self.failed),
            "time/eval_s": self.wall_s,
            **metrics,
        }


def evaluate(
    rollouter: Any, panel: Panel, *, seed: int, temperature: float, progress: Any = None
) -> PanelResult:
    """Play every game of the panel once.

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
    won = tuple(bool(g.members and g.members[0].won) for g in groups)
    return PanelResult(
        prompt_ids=tuple(p.prompt_id for p in panel.prompts),
        won=won,
        failed=sum(len(g.failures) for g in groups),
        wall_s=time.perf_counter() - started,
    )


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Mean paired difference after - before and its 95 % normal interval: (mean, low, high).

    Example: 4 games, one newly won: mean 0.25, interval 0.25 -+ 1.96 * 0.25. One game alone says
    nothing about the spread, so its interval is all that is possible, -1 to 1.
    """
    import numpy as np

    difference = np.asarray(after, float) - np.asarray(before, float)
    mean = float(difference.mean())
    if len(difference) < 2:
        return mean, -1.0, 1.0
    half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return mean, mean - half, mean + half
