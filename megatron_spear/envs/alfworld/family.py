"""ALFWorld for the trainer: games as prompts, the environment, its views and demonstrations."""

import functools
import random
from collections.abc import Sequence
from dataclasses import replace

from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.config.schema import SftSection
from megatron_spear.data.prompts import CheckedPrompts, FreshPrompts, PoolPrompts, PromptSource
from megatron_spear.envs.alfworld import task
from megatron_spear.envs.alfworld.demonstrations import demonstrate
from megatron_spear.envs.alfworld.game import GameFile, parse_game
from megatron_spear.envs.alfworld.phrases import NAMES, PHRASES
from megatron_spear.envs.alfworld.prompts import alfworld_view
from megatron_spear.envs.alfworld.sources import games_sha256, require_winnable
from megatron_spear.envs.alfworld.vocabulary import alfworld_words
from megatron_spear.envs.demonstration import Demonstration
from megatron_spear.envs.family import EnvironmentFamily, Panel, Vocabulary
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import DataError
from megatron_spear.types import TaskType

_MAX_TRIES = 50


class AlfworldFamily(EnvironmentFamily):
    """Household games: loaded ones epoch by epoch, or generated ones, never the same twice."""

    factory = "megatron_spear.envs.alfworld.environment:AlfworldEnvironment"

    def __init__(self, section: AlfworldSection) -> None:
        self._section = section

    def view(self) -> AgentView:
        """The view of ``env.prompt``."""
        return alfworld_view(self._section.prompt)

    def training(self, order_seed: int, made_seed: int) -> PromptSource:
        """The training split, or fresh games."""
        if self._section.games is not None:
            return _loaded(task.training_games(self._section), order_seed)
        return self._fresh(made_seed, self._section.task_types)

    def training_by_kind(self, order_seed: int, made_seed: int) -> dict[str, PromptSource]:
        """By task type, in the order of the setting."""
        kinds: Sequence[TaskType] = tuple(dict.fromkeys(self._section.task_types))
        if self._section.games is None:
            return {
                kind: self._fresh(made_seed, [kind], first=number, stride=len(kinds))
                for number, kind in enumerate(kinds)
            }
        games: dict[str, list[GameFile]] = {kind: [] for kind in kinds}
        for game in task.training_games(self._section):
            games[game.task_type].append(game)
        return {kind: _loaded(own, order_seed) for kind, own in games.items() if own}

    def panel(self, size: int | None, made_seed: int) -> Panel:
        """Generated games, or a spread of the evaluation split, or all of it."""
        return task.make_panel(self._section, size, made_seed)

    def demonstration(self, section: SftSection, made_seed: int, index: int) -> Demonstration:
        """A game as the planner plays it, with slips; loaded games are drawn."""
        env, rng = self._section, random.Random(f"sft/{section.seed}/{index}")
        for attempt in range(_MAX_TRIES):
            if env.games is None:
                number = index + attempt * 1_000_003
                file = task.fresh_game(made_seed, number, env.task_types, env.generator)
                game = parse_game(file)
            else:
                file = rng.choice(_training_games(env))
                game = require_winnable(file)
            played = demonstrate(
                game,
                rng,
                explore=section.explore,
                noise=section.noise,
                max_turns=env.max_turns,
                admissible=self.view().needs_admissible,
            )
            if played is not None:
                return replace(played, prompt=task.game_prompt(file))
        raise DataError(
            f"sft: got no demonstration within env.max_turns={env.max_turns} in {_MAX_TRIES} "
            "games; raise env.max_turns or lower sft.explore and sft.noise"
        )

    def vocabulary(self) -> Vocabulary:
        """The games' closed word list."""
        return Vocabulary(alfworld_words(), tuple(PHRASES), tuple(NAMES))

    def contents(self) -> dict[str, str]:
        """Of the training split, where games are loaded."""
        env = self._section
        if env.games is None:
            return {}
        return {"games": games_sha256(env.games, split=env.train_split)}

    def _fresh(
        self, seed: int, kinds: Sequence[TaskType], first: int = 0, stride: int = 1
    ) -> PromptSource:
        """Generated games ``first``, ``first + stride``, ... of a seed: two sources whose games
        interleave never draw a game from the same number."""
        size = self._section.generator
        return FreshPrompts(
            lambda index: task.game_prompt(
                task.fresh_game(seed, first + index * stride, kinds, size)
            )
        )


def _loaded(games: Sequence[GameFile], order_seed: int) -> PromptSource:
    pool = [task.game_prompt(game) for game in games]
    return CheckedPrompts(PoolPrompts(pool, order_seed), task.check_winnable)


@functools.lru_cache(maxsize=1)
def _training_games(section: AlfworldSection) -> list[GameFile]:
    """The training games of ``env.games``, read once in a process."""
    return task.training_games(section)
