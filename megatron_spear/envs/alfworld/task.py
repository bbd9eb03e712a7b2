"""ALFWorld games as prompts: the endless training source's items and the fixed evaluation panel."""

import hashlib
import json
from collections.abc import Sequence

from megatron_spear.config.environments.alfworld import AlfworldSection, GeneratorSection
from megatron_spear.envs.alfworld.game import GameFile
from megatron_spear.envs.alfworld.generator import generate_game
from megatron_spear.envs.alfworld.sources import load_games, require_winnable
from megatron_spear.envs.family import Panel
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.types import Prompt, TaskType


def game_prompt(game: GameFile) -> Prompt:
    """One game as a prompt; its metadata are the environment's reset options."""
    return Prompt(
        prompt_id=game.id,
        env="alfworld",
        kind=game.task_type,
        metadata={"game": game.to_fields()},
    )


def check_winnable(prompt: Prompt) -> None:
    """Raise DataError unless the prompt's game can be won."""
    require_winnable(GameFile(**prompt.metadata["game"]))


def fresh_game(
    seed: int, index: int, task_types: Sequence[TaskType], size: GeneratorSection
) -> GameFile:
    """Generated game number ``index`` of a seed."""
    return generate_game(seed, index, task_types=tuple(task_types), settings=size)


def training_games(settings: AlfworldSection) -> list[GameFile]:
    """The loaded training games (``env.games`` is given)."""
    return _load(settings, settings.train_split)


def make_panel(settings: AlfworldSection, size: int | None, seed: int) -> Panel:
    """The evaluation panel: generated games, or a spread of the loaded evaluation split.

    Loaded games: sorted by id, every n-th (``size`` None = all), each once, so that the same games
    give the same panel everywhere, whatever file or folder they come in.
    Raises DataError when the split has fewer games than asked for, or one that cannot be won;
    ConfigError for all of the generated games, of which there is no end.
    """
    if settings.games is None:
        if size is None:
            raise ConfigError(
                "evaluation.games=null takes all games of a split, and without env.games they are "
                "generated without end; give a number, or set env.games"
            )
        games = [fresh_game(seed, i, settings.task_types, settings.generator) for i in range(size)]
    else:
        games = _spread(settings, size)
        for game in games:
            require_winnable(game)
    digest = hashlib.sha256()
    for game in games:
        digest.update(json.dumps([game.id, game.problem]).encode())
    return Panel(tuple(game_prompt(g) for g in games), digest.hexdigest())


def _spread(settings: AlfworldSection, size: int | None) -> list[GameFile]:
    """So many games of the evaluation split, evenly over the sorted ids."""
    read = {(game.id, game.problem): game for game in _load(settings, settings.eval_split)}
    loaded = [read[key] for key in sorted(read)]
    size = len(loaded) if size is None else size
    if len(loaded) < size:
        raise DataError(
            f"evaluation.games: got {size}, but {settings.games} ({settings.eval_split}) has "
            f"only {len(loaded)} fitting games; lower evaluation.games or relax the filters"
        )
    return [loaded[i * len(loaded) // size] for i in range(size)]


def _load(settings: AlfworldSection, split: str | None) -> list[GameFile]:
    assert settings.games is not None, "fresh games are made by fresh_game"
    return load_games(
        settings.games,
        split=split,
        task_types=settings.task_types,
        max_receptacles=settings.max_receptacles,
        skip_unsolvable=settings.skip_unsolvable,
    )
