"""The shortest way to a family of one's own: name the environment and say what the tasks are.

class NumberGame(SimpleFamily):
    environment = GuessEnvironment

    def make_task(self, rng):
        return {"number": rng.randint(1, 20)}
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_spear.config.schema import SftSection
from megatron_spear.data.prompts import FreshPrompts, PoolPrompts, PromptSource
from megatron_spear.envs.demonstration import (
    Demonstration,
    DemonstrationTurn,
    Player,
    play_demonstration,
)
from megatron_spear.envs.family import EnvironmentFamily, Panel, Vocabulary
from megatron_spear.envs.plain_view import PlainView
from megatron_spear.envs.protocol import TextEnvironment
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.types import Prompt
from megatron_spear.user_code import code_path

Task = Mapping[str, Any]
"""The options of ``environment.reset``: plain JSON values."""

_TRIES = 1000
_MAX_LOST = 50


class SimpleFamily(EnvironmentFamily):
    """Tasks from a list or made at will, some of them held out, shown in a plain chat.

    A task says by its contents alone whether it is held out for the panel (one in
    ``held_out_every``) or trained on: so neither order nor seed, nor a task that is made twice,
    mixes the two. A subclass names ``environment`` and has ``tasks`` (a list) or ``make_task``.
    """

    environment: type[TextEnvironment]
    """The class that plays, at the top level of a module; workers make it without arguments, or
    with ``factory_options``."""
    held_out_every: int = 5
    """One task in this many is kept for evaluation and demonstrates nothing."""
    system: str = ""
    """What the system message says; "" = there is none."""
    words: tuple[str, ...] = ()
    """All words of the tasks, for a tiny model's own tokenizer; () = a model is given."""
    slips: tuple[str, ...] = ()
    """Bad actions that demonstrations recover from, one a turn with chance ``sft.noise``."""
    max_demonstrated: int = 100
    """Turns after which the expert has failed."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "environment" in cls.__dict__ and "factory" not in cls.__dict__:
            cls.factory = code_path(cls.environment)

    def tasks(self) -> Sequence[Task] | None:
        """The whole list of tasks; None = they are made by ``make_task``."""
        return None

    def make_task(self, rng: random.Random) -> Task:
        """One task, drawn with ``rng`` and nothing else, so that it can be made again."""
        raise DataError(
            f"{type(self).__name__} has neither tasks() nor make_task(rng); write one of them"
        )

    def kind(self, task: Task) -> str:
        """Which of ``task_kinds`` a task is; "" where there is one kind."""
        return ""

    def identity(self, task: Task) -> Any:
        """What makes two tasks the same one for the panel, as JSON values: the whole task."""
        return task

    def expert(self, task: Task, observation: str, turns: tuple[DemonstrationTurn, ...]) -> str:
        """The best action now, for a warm start; a family without it demonstrates nothing.

        ``turns`` hold what was seen and done before, slips included.
        """
        raise NotImplementedError

    def view(self) -> AgentView:
        """A plain chat, the answer as a whole being the action."""
        return PlainView()

    def prompt(self, task: Task) -> Prompt:
        """A task as a prompt, named by a hash of its contents."""
        messages = ({"role": "system", "content": self.system},) if self.system else ()
        return Prompt(
            prompt_id=_name(task),
            env=type(self).__name__,
            kind=self.kind(task),
            messages=messages,
            metadata=dict(task),
        )

    def training(self, order_seed: int, made_seed: int) -> PromptSource:
        """The tasks that are not held out."""
        return self._training(order_seed, made_seed, lambda kind: True)

    def training_by_kind(self, order_seed: int, made_seed: int) -> Mapping[str, PromptSource]:
        """The same for each of ``task_kinds`` that has any."""
        if not self.task_kinds:
            return super().training_by_kind(order_seed, made_seed)
        listed = self.tasks()
        present = self.task_kinds if listed is None else {self.kind(task) for task in listed}
        return {
            kind: self._training(order_seed, f"{made_seed}/{kind}", kind.__eq__)
            for kind in self.task_kinds
            if kind in present
        }

    def panel(self, size: int | None, made_seed: int) -> Panel:
        """The first ``size`` held-out tasks: by their hashes in a list, as they come if made."""
        listed = self.tasks()
        if size is None and listed is None:
            raise ConfigError(
                f"evaluation.games=null takes all held-out tasks, and {type(self).__name__} makes "
                "its own without end; give a number"
            )
        chosen: dict[str, Task] = {}
        for task in self._candidates(size, made_seed):
            if self._held_out(task):
                chosen.setdefault(self._key(task), task)
            if len(chosen) == size:
                break
        if not chosen or len(chosen) < (size or 0):
            raise DataError(
                f"evaluation.games: got {size}, but {type(self).__name__} has only {len(chosen)} "
                f"tasks that are held out (one in {self.held_out_every}); lower it or "
                "held_out_every, or give it more tasks"
            )
        return Panel.of([self.prompt(task) for task in chosen.values()])

    def demonstration(self, section: SftSection, made_seed: int, index: int) -> Demonstration:
        """What the expert does in a training task, with slips; a task that is lost so is left out
        for another one."""
        if type(self).expert is SimpleFamily.expert:
            return super().demonstration(section, made_seed, index)
        rng = random.Random(f"sft/{section.seed}/{index}")
        known: dict[tuple[int, int], PromptSource] = self.__dict__.setdefault("_demonstrated", {})
        if (section.seed, made_seed) not in known:  # a long list is hashed once
            known[section.seed, made_seed] = self.training(section.seed, made_seed)
        prompts = known[section.seed, made_seed]
        environment = self.environment(**self.factory_options)
        try:
            for attempt in range(_MAX_LOST):
                prompt = prompts.at(index + attempt * 1_000_003)
                played = play_demonstration(
                    environment,
                    prompt,
                    self._player(prompt.metadata, section.noise, rng),
                    max_turns=self.max_demonstrated,
                    admissible=self.view().needs_admissible,
                )
                if played is not None:
                    return played
        finally:
            environment.close()
        raise DataError(
            f"{type(self).__name__}.expert lost {_MAX_LOST} tasks in a row, the last "
            f"{dict(prompt.metadata)!r:.200}; repair it, lower sft.noise (slips cost turns) or "
            "raise max_demonstrated"
        )

    def _player(self, task: Task, noise: float, rng: random.Random) -> Player:
        def player(
            observation: str, info: Mapping[str, Any], turns: tuple[DemonstrationTurn, ...]
        ) -> tuple[str, bool]:
            if self.slips and rng.random() < noise:
                return rng.choice(self.slips), False
            return self.expert(task, observation, turns), True

        return player

    def vocabulary(self) -> Vocabulary:
        """``words``."""
        return Vocabulary(self.words) if self.words else super().vocabulary()

    def _training(
        self, order_seed: int, made_seed: int | str, wanted: Callable[[str], bool]
    ) -> PromptSource:
        def trained(task: Task) -> bool:
            return wanted(self.kind(task)) and not self._held_out(task)

        def make(index: int) -> Prompt:
            tries = (self._made(f"{made_seed}/{index}/{number}") for number in range(_TRIES))
            task = next(filter(trained, tries), None)
            if task is None:
                raise DataError(f"{name}.make_task gave no task to train on in {_TRIES} tries{why}")
            return self.prompt(task)

        name = type(self).__name__
        why = f": all were held out (one in {self.held_out_every}) or of another kind; change one"
        listed = self.tasks()
        if listed is None:
            return FreshPrompts(make)
        kept = {self._key(task): self.prompt(task) for task in listed if trained(task)}
        if not kept:
            raise DataError(f"{name}.tasks() has none of {len(listed)} to train on{why}")
        return PoolPrompts(tuple(kept.values()), order_seed)

    def _candidates(self, size: int | None, made_seed: int) -> Iterator[Task]:
        """Tasks for a panel of this size, held out or not."""
        listed = self.tasks()
        if listed is not None:
            yield from sorted(listed, key=self._key)
        else:
            yield from (self._made(f"panel/{made_seed}/{n}") for n in range(_TRIES * (size or 0)))

    def _made(self, key: str) -> Task:
        return self.make_task(random.Random(f"task/{key}"))

    def _held_out(self, task: Task) -> bool:
        return int(self._key(task), 16) % self.held_out_every == 0

    def _key(self, task: Task) -> str:
        return _name(self.identity(task))


def _name(task: Any) -> str:
    """16 hex digits of the task's contents. Raises DataError unless they are JSON values."""
    try:
        text = json.dumps(task, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a task is no map of plain values ({error}): {task!r:.200}; use texts, numbers, "
            "lists and maps"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]
