"""Where prompts come from, in which order: pure functions of a position, so resume is one
number."""

import functools
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from megatron_spear.errors import ConfigError, DataError
from megatron_spear.types import Prompt


def prompts_sha256(prompts: Iterable[Prompt]) -> str:
    """Of the ids and contents of prompts, in order; some seconds for a million.

    Raises DataError unless their metadata are JSON values.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        parts = [prompt.prompt_id, prompt.kind, prompt.answer, list(prompt.messages)]
        try:
            text = json.dumps([*parts, dict(prompt.metadata)], sort_keys=True)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"prompt {prompt.prompt_id}: its metadata are no plain values ({error}); use "
                "texts, numbers, lists and maps, which every machine writes the same way"
            ) from error
        digest.update(text.encode())
    return digest.hexdigest()


class PromptSource(Protocol):
    """An endless sequence of prompts; position ``i`` always gives the same prompt."""

    @property
    def sha256(self) -> str | None:
        """Of a fixed list of prompts, in order; None where prompts are made on demand."""
        ...

    def at(self, position: int) -> Prompt:
        """The prompt at a 0-based position."""
        ...


class Cursor(ABC):
    """Which prompts come next, each given exactly once; its state is plain JSON values.

    What was begun for a later step is kept until it is settled, so that a resumed run begins it
    again with the same prompts. Positions mean nothing in another list of prompts, so ``sha256`` of
    the list (None where prompts are made on demand) is part of the state.

    Example: after ``begin(5, 8)`` and ``take(2)`` of fresh prompts, ``state_dict()`` is
    ``{"consumed": 10, "begun": {"5": [0, 1, 2, 3, 4, 5, 6, 7]}}``; ``settle(5)`` leaves
    ``{"consumed": 10}``. Those of a list have ``"prompts_sha256"`` besides.
    """

    def __init__(self, sha256: str | None) -> None:
        self._sha256 = sha256
        self._begun: dict[int, list[Any]] = {}

    @abstractmethod
    def claim(self, count: int) -> list[Any]:
        """The positions of the next ``count`` prompts, which count as consumed from now on."""

    @abstractmethod
    def at(self, position: Any) -> Prompt:
        """The prompt at a claimed position."""

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """Where it stands."""

    @abstractmethod
    def move(self, position: dict[str, Any]) -> None:
        """Stand where it stood."""

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        return [self.at(position) for position in self.claim(count)]

    def begin(self, step: int, count: int) -> list[Prompt]:
        """The prompts of a step that will be settled later: those it was begun with, or the next
        ``count``."""
        if step not in self._begun:
            self._begun[step] = self.claim(count)
        return [self.at(position) for position in self._begun[step]]

    def settle(self, step: int) -> list[Any]:
        """The step's prompts were played and go into training now; returns their positions."""
        return self._begun.pop(step)

    def begun(self, step: int) -> list[Prompt]:
        """The prompts that a later step was begun with; none if it was not begun."""
        return [self.at(position) for position in self._begun.get(step, [])]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands and in which list, and what was begun and not settled."""
        state = self.position()
        if self._sha256 is not None:
            state["prompts_sha256"] = self._sha256
        if self._begun:
            state["begun"] = {str(step): positions for step, positions in self._begun.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where it stood. Raises ConfigError where that was in another list."""
        position = dict(state)
        begun, saved = position.pop("begun", {}), position.pop("prompts_sha256", None)
        if saved != self._sha256:
            raise ConfigError(
                f"the prompts to train on have changed: their sha256 was {str(saved)[:16]}, is now "
                f"{str(self._sha256)[:16]}, and a resumed run goes on in the order of the same "
                "prompts; put the files that they come from back, or start again with another "
                "run.dir"
            )
        self.move(position)
        self._begun = {int(step): list(positions) for step, positions in begun.items()}


class FreshPrompts:
    """Prompts that are made on demand, never the same one twice (``make(i)`` must depend on i
    only)."""

    sha256 = None

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

    @functools.cached_property
    def sha256(self) -> str | None:
        """Of the pool, whatever the seed. Raises DataError as ``prompts_sha256``."""
        return prompts_sha256(self._prompts)

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

    @property
    def sha256(self) -> str | None:
        """The source's."""
        return self._source.sha256

    def at(self, position: int) -> Prompt:
        """The source's prompt at this position; raises what its check raises."""
        prompt = self._source.at(position)
        if prompt.prompt_id not in self._checked:
            self._check(prompt)
            self._checked.add(prompt.prompt_id)
        return prompt


class PromptCursor(Cursor):
    """The prompts of one source in its order.

    Example: after ``take(8)`` twice, ``state_dict()`` is ``{"consumed": 16}`` where the prompts are
    made on demand.
    """

    def __init__(self, source: PromptSource) -> None:
        super().__init__(source.sha256)
        self._source = source
        self.consumed = 0

    def claim(self, count: int) -> list[int]:
        """The next ``count`` positions of the source."""
        first = self.consumed
        self.consumed += count
        return list(range(first, self.consumed))

    def at(self, position: int) -> Prompt:
        """The source's prompt."""
        return self._source.at(position)

    def position(self) -> dict[str, Any]:
        """How many prompts were consumed."""
        return {"consumed": self.consumed}

    def move(self, position: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self.consumed = int(position["consumed"])
