"""Measures how often each kind of task is won, for the draw of the next step's prompts."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_spear.curriculum.task_sampling import TaskSampler
from megatron_spear.replay.state import require_keys
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.types import Prompt, ScoredGroup, StepContext


class CurriculumHook(Hook):
    """Tells the sampler, from which the prompt cursor draws, what was won; saves what it knows.

    ``bucket`` says which of the sampler's buckets a prompt is in. Comes before hooks that leave
    groups out: what they drop was played all the same.
    """

    def __init__(self, sampler: TaskSampler, bucket: Callable[[Prompt], str]) -> None:
        self._sampler, self._bucket = sampler, bucket
        self._metrics: dict[str, float] = {}

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        """Count the step's attempts; the groups go on as they are."""
        drawn = self._sampler.shares
        won: dict[str, list[bool]] = {}
        for group in groups:
            results = won.setdefault(self._bucket(group.prompt), [])
            results += [member.trajectory.won for member in group.members]
        self._sampler.measure(won)
        self._metrics = {f"curriculum/share_{name}": share for name, share in drawn.items()}
        for name, success in self._sampler.success.items():
            self._metrics[f"curriculum/success_{name}"] = success
        return groups

    def metrics(self) -> dict[str, float]:
        """``curriculum/share_*``: probabilities this step's prompts were drawn with;
        ``curriculum/success_*``: the success measured, this step included."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """What was measured, of which the cursor has no copy."""
        return {**self._sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; CheckpointError on other keys or buckets."""
        require_keys(state, ("wins", "attempts"), type(self).__name__)
        for name, counts in state.items():
            require_keys(counts, self._sampler.buckets, f"{type(self).__name__}.{name}")
        self._sampler.load_state_dict(state)
        self._metrics = {}
