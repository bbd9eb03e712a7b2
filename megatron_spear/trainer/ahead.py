"""Rollouts that run ahead of training by up to ``rollout.max_lag`` policy versions.

Step s trains on version s - 1. Its trajectories, set s, are begun when version s - 1 - max_lag is
published, in the order of the steps, so no token of them is older than that:

    max_lag 1:   version 0 [sets 1 and 2 begin]  step 1, version 1 [set 3 begins]  step 2, ...

``rollout.schedule`` says what an update finds:

- ``continuous``: sets under way. The engine pauses; what is under way goes on with the new weights
  or is drawn again (``rollout.pause_mode``).
- ``deterministic``: none. The update waits until all that was begun is whole, so that all of set s
  is of version max(0, s - 1 - max_lag), whatever the timing; a step trains while one set is drawn.

Steps take their set whole and in order: slow prompts hold their own step up and are never passed
over. A checkpoint keeps the sets that are whole; a resumed run begins the others again with the
same prompts. No set is begun beyond the last step N, so a run that is made longer later begins sets
N + 1 to N + max_lag with version N: it is not the run that was as long from the start.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

from megatron_spear.config.rollout import RolloutSection
from megatron_spear.data.prompts import Cursor
from megatron_spear.types import Prompt, StepContext, TrajectoryGroup


class Starts(Protocol):
    """What plays prompts while others go on (a ``Rollouter``)."""

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: tuple[int, ...],
        temperature: float,
        progress: Callable[[int], None] | None = None,
    ) -> "Future[list[TrajectoryGroup]]":
        """Begin; the future's result is one group a prompt."""
        ...


class RolloutsAhead:
    """The trajectories of each step, begun up to ``max_lag`` steps early; none after
    ``last_step``."""

    def __init__(
        self, rollouter: Starts, cursor: Cursor, rollout: RolloutSection, last_step: int
    ) -> None:
        self._rollouter, self._cursor = rollouter, cursor
        self._rollout, self._last_step = rollout, last_step
        self._sets: dict[int, Future[list[TrajectoryGroup]]] = {}
        self._finished: dict[int, int] = {}

    def play(
        self, ctx: StepContext, progress: Callable[[int], None] | None = None
    ) -> tuple[list[Any], list[TrajectoryGroup]]:
        """The prompts' positions and the groups of step ``ctx.step``; begins those of the steps
        that may run ahead of it.

        ``progress(finished)`` is called with the attempts of this step that are done whenever one
        of any step is. Raises as ``Rollouter.collect``.
        """
        self._progress = (ctx.step, progress)
        newest = max(ctx.step, min(ctx.step + self._rollout.max_lag, self._last_step))
        for step in range(ctx.step, newest + 1):
            if step not in self._sets:
                self._begin(step, ctx.seed)
        groups = self._sets[ctx.step].result()
        del self._sets[ctx.step], self._finished[ctx.step]
        return self._cursor.settle(ctx.step), groups

    def before_update(self) -> None:
        """Wait for what the schedule wants whole before the weights change. What a set failed with
        is raised in its own step."""
        if self._rollout.schedule == "deterministic":
            wait(self._sets.values())

    def whole(self) -> dict[int, list[TrajectoryGroup]]:
        """The sets of later steps that need no more playing."""
        return {step: s.result() for step, s in self._sets.items() if s.done() and not _failed(s)}

    def take_back(self, sets: Mapping[int, list[TrajectoryGroup]]) -> None:
        """Go on with what ``whole`` gave, whose prompts the cursor has as begun."""
        self._sets, self._finished = {}, {}
        for step, groups in sets.items():
            done: Future[list[TrajectoryGroup]] = Future()
            done.set_result(groups)
            self._sets[step], self._finished[step] = done, 0

    def _begin(self, step: int, seed: int) -> None:
        self._finished[step] = 0

        def note(finished: int) -> None:
            if step in self._finished:
                self._finished[step] = finished
            current, progress = self._progress
            if progress is not None:
                progress(self._finished.get(current, 0))

        self._sets[step] = self._rollouter.start(
            self._cursor.begin(step, self._rollout.prompts_per_step),
            group_size=self._rollout.group_size,
            seed=(seed, step),
            temperature=self._rollout.temperature,
            progress=note,
        )


def _failed(done: "Future[list[TrajectoryGroup]]") -> bool:
    return done.cancelled() or done.exception() is not None
