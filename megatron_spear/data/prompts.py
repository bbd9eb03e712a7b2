"""Where prompts come from, in which order: pure functions of a position, so resume is one
number."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_spear.errors import DataError
from megatron_spear.types import Prompt


class PromptSource(Protocol):
    """An endless sequence of prompts; position ``i`` always gives the same prompt."""

    def at(self, position: int) -> Prompt:
        """The prompt at a 0-based position."""
        ...


class Cursor(Protocol):
    """Which prompts come next; its state is plain JSON values."""

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; they count as consumed from now on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where it stood."""
        ...


class FreshPrompts:
    """Prompts that are made on demand, never the same one twice (``make(i)`` must depend on i
    only)."""

    def __init__(self, make: Callable[[int], Prompt]) -> None:
        self._make = make

    def at(self, position: int) -> Prompt:
        """The prompt made for this position."""
        return self._make(position)


class PoolPrompts:
    """A fixed pool in a new random order each epoch; every prompt once an epoch.

    The order of epoch e is drawn from (seed, e) alone. Raises DataError on an empty pool.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError(
                "prompt pool: got 0 prompts, expected at least one; check env.games, the split "
                "and the filters (env.task_types, env.max_receptacles)"
            )
        self._prompts = tuple(prompts)
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def at(self, position: int) -> Prompt:
        """The prompt at this position of the endless order."""
        epoch, index = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._order = list(range(len(self._prompts)))
            random.Random(f"prompt-order/{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._prompts[self._order[index]]


class CheckedPrompts:
    """The prompts of another source, each checked when it is first drawn."""

    def __init__(self, source: PromptSource, check: Callable[[Prompt], None]) -> None:
        self._source, self._check = source, check
        self._checked: set[str] = set()

    def at(self, position: int) -> Prompt:
        """The source's prompt at this position; raises what its check raises."""
        prompt = self._source.at(position)
        if prompt.prompt_id not in self._checked:
            self._check(prompt)
            self._checked.add(prompt.prompt_id)
        return prompt


class PromptCursor:
    """How many prompts were consumed, each exactly once, and the next ones.

    Example: after ``take(8)`` twice, ``state_dict()`` is ``{"consumed": 16}``.
    """

    def __init__(self, source: PromptSource) -> None:
        self._source = source
        self.consumed = 0

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; they count as consumed from now on."""
        prompts = [self._source.at(self.consumed + i) for i in range(count)]
        self.consumed += count
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self.consumed = int(state["consumed"])
