"""The families of environments that other libraries bring."""

import functools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_spear.config.environments.adapters import (
    GemSection,
    GymnasiumSection,
    ReasoningGymSection,
    SkyrlGymSection,
    VerifiersSection,
)
from megatron_spear.data.prompts import PoolPrompts, PromptSource
from megatron_spear.envs.adapters.gem import GemEnvironment
from megatron_spear.envs.adapters.gymnasium import GymnasiumEnvironment
from megatron_spear.envs.adapters.library import require_library
from megatron_spear.envs.adapters.reasoning_gym import ReasoningGymEnvironment, open_dataset
from megatron_spear.envs.adapters.skyrl_gym import SkyrlGymEnvironment
from megatron_spear.envs.adapters.verifiers import VerifiersEnvironment, load_tasks
from megatron_spear.envs.demonstration import DemonstrationTurn
from megatron_spear.envs.family import Panel
from megatron_spear.envs.plain_view import PlainView
from megatron_spear.envs.simple import SimpleFamily, Task
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import DataError
from megatron_spear.types import Prompt

_LARGEST_SEED = 2**31 - 1
_ANSWER_FORM = "Write the final answer, and nothing else, between <answer> and </answer>."


class ReasoningGymFamily(SimpleFamily):
    """Questions by number; equal ones are trained on or held out together.

    Demonstrations show the answer that comes with a question, where one does.
    """

    environment = ReasoningGymEnvironment

    def __init__(self, section: ReasoningGymSection) -> None:
        self._section = section
        self.task_kinds = section.task_kinds
        for name in section.datasets:
            self._dataset(name)

    @property
    def factory_options(self) -> Mapping[str, Any]:
        """The data sets."""
        env = self._section
        return {"datasets": env.datasets, "size": env.size, "seed": env.seed, "won_at": env.won_at}

    def view(self) -> AgentView:
        """The answer stands between tags, behind any reasoning."""
        return PlainView(tag="answer", instruction=_ANSWER_FORM)

    def make_task(self, rng: random.Random) -> Task:
        """A question of a data set drawn evenly."""
        name = rng.choice(list(self._section.datasets))
        return {"dataset": name, "index": rng.randrange(self._section.size)}

    def kind(self, task: Task) -> str:
        """The data set."""
        return str(task["dataset"])

    def identity(self, task: Task) -> Any:
        """The question."""
        return [task["dataset"], self._entry(task)["question"]]

    def expert(self, task: Task, observation: str, turns: tuple[DemonstrationTurn, ...]) -> str:
        """The answer that the data set gives; "" where it gives none."""
        return str(self._entry(task)["answer"] or "")

    def _entry(self, task: Task) -> Mapping[str, Any]:
        entry: Mapping[str, Any] = self._dataset(task["dataset"])[task["index"]]
        return entry

    def _dataset(self, name: str) -> Any:
        env = self._section
        return open_dataset(name, env.datasets[name], env.size, env.seed)


class _Seeded(SimpleFamily):
    """Tasks that are seeds of one environment."""

    def __init__(self, section: GemSection | GymnasiumSection) -> None:
        require_library(section.type)
        self._section = section

    @property
    def factory_options(self) -> Mapping[str, Any]:
        """What the library's ``make`` needs."""
        env = self._section
        return {"id": env.id, "arguments": env.arguments, "won_at": env.won_at}

    def make_task(self, rng: random.Random) -> Task:
        """A seed."""
        return {"seed": rng.randrange(_LARGEST_SEED)}


class GemFamily(_Seeded):
    """One of GEM's environments; the answer as a whole is the action."""

    environment = GemEnvironment


class GymnasiumFamily(_Seeded):
    """One of gymnasium's environments; a wrong id, space or name is told at once."""

    environment = GymnasiumEnvironment

    def __init__(self, section: GymnasiumSection) -> None:
        super().__init__(section)
        self._actions = section.actions
        GymnasiumEnvironment(**self.factory_options).close()

    @property
    def factory_options(self) -> Mapping[str, Any]:
        """The same with the names of actions."""
        return {**super().factory_options, "actions": self._actions}


class SkyrlGymFamily(SimpleFamily):
    """Rows of two files: one is trained on, of the other the panel is made."""

    environment = SkyrlGymEnvironment

    def __init__(self, section: SkyrlGymSection) -> None:
        require_library(section.type)
        self._section = section

    @property
    def factory_options(self) -> Mapping[str, Any]:
        """What SkyRL Gym's ``make`` needs."""
        env = self._section
        return {"id": env.id, "arguments": env.arguments, "won_at": env.won_at}

    def prompt(self, task: Task) -> Prompt:
        """A row; its first messages come before the first observation, which is the last one."""
        made = super().prompt({"row": dict(task)})
        messages = tuple(dict(message) for message in task["prompt"][:-1])
        return Prompt(
            prompt_id=made.prompt_id, env=made.env, messages=messages, metadata=made.metadata
        )

    def training(self, order_seed: int, made_seed: int) -> PromptSource:
        """The rows of ``env.train_file`` that are on no panel."""
        held_out = {self._key(row) for row in _rows(self._section.eval_file)}
        rows = [row for row in _rows(self._section.train_file) if self._key(row) not in held_out]
        if not rows:
            raise DataError(
                f"env.train_file={self._section.train_file} has no row that is not in "
                "env.eval_file; give it others"
            )
        return PoolPrompts([self.prompt(row) for row in rows], order_seed)

    def panel(self, size: int | None, made_seed: int) -> Panel:
        """The first rows of ``env.eval_file`` by their hashes, or all of them."""
        rows = {self._key(row): row for row in _rows(self._section.eval_file)}
        if len(rows) < (size or 1):
            raise DataError(
                f"evaluation.games: got {size}, but env.eval_file={self._section.eval_file} has "
                f"{len(rows)} different rows; lower evaluation.games"
            )
        chosen = sorted(rows)[:size]
        return Panel.of([self.prompt(rows[key]) for key in chosen])


class VerifiersFamily(SimpleFamily):
    """The first tasks of a taskset, some of them held out."""

    environment = VerifiersEnvironment

    def __init__(self, section: VerifiersSection) -> None:
        self._section = section
        self._loaded = load_tasks(section.taskset, section.arguments, section.num_tasks)

    @property
    def factory_options(self) -> Mapping[str, Any]:
        """What loads the taskset again."""
        env = self._section
        loaded = {"taskset": env.taskset, "arguments": env.arguments, "num_tasks": env.num_tasks}
        return {**loaded, "won_at": env.won_at}

    def tasks(self) -> Sequence[Task]:
        """Numbers with the tasks' own keys."""
        return [{"index": index, "key": task.key} for index, task in enumerate(self._loaded)]

    def identity(self, task: Task) -> Any:
        """The task's key: the hash of its data, its number left out."""
        data = self._loaded[task["index"]].data
        return data.model_dump(mode="json", exclude_none=True, exclude={"idx"})

    def prompt(self, task: Task) -> Prompt:
        """A task, with its system prompt."""
        made, system = super().prompt(task), self._loaded[task["index"]].data.system_prompt
        messages = ({"role": "system", "content": system},) if system else ()
        return Prompt(
            prompt_id=made.prompt_id, env=made.env, messages=messages, metadata=made.metadata
        )


@functools.lru_cache(maxsize=4)
def _rows(file: Path) -> tuple[dict[str, Any], ...]:
    """The rows of a file of JSON lines, each with a prompt of messages. Raises DataError."""
    rows = []
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages = [(message["role"], message["content"]) for message in row["prompt"]]
            if not messages or not all(isinstance(part, str) for m in messages for part in m):
                raise ValueError("its prompt is no list of messages with role and content")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} line {number}: {type(error).__name__}: {error}; expected a JSON map with "
                'prompt, a list of {"role": .., "content": ..}'
            ) from error
        rows.append(row)
    return tuple(rows)
