"""Settings of ALFWorld's household games."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_spear.config.base import PositiveInt, Section
from megatron_spear.config.environments.base import EnvironmentSection
from megatron_spear.errors import ConfigError
from megatron_spear.types import TASK_TYPES, TaskType


class GeneratorSection(Section):
    """Size of generated games."""

    min_receptacles: Annotated[int, Field(ge=8, le=40)] = 8
    """Fewest receptacles in a room."""
    max_receptacles: Annotated[int, Field(ge=8, le=40)] = 12
    """Most receptacles in a room."""
    min_objects: Annotated[int, Field(ge=4, le=80)] = 8
    """Fewest movable objects in a room."""
    max_objects: Annotated[int, Field(ge=4, le=80)] = 14
    """Most movable objects in a room."""

    @model_validator(mode="after")
    def _ordered(self) -> "GeneratorSection":
        for low, high in (("min_receptacles", "max_receptacles"), ("min_objects", "max_objects")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}; "
                    f"expected {low} <= {high}"
                )
        return self


class AlfworldSection(EnvironmentSection):
    """ALFWorld household games, played by the native engine."""

    type: Literal["alfworld"] = "alfworld"
    """Which environment."""
    games: Path | None = None
    """Folder of games with splits (official ``game.tw-pddl`` tree, or packed
    ``<split>.jsonl[.xz]``). One file has no splits: ``sft`` and ``evaluate`` take it whole,
    ``train`` refuses it, since its panel must not be trained on. None = games are generated fresh
    for every step."""
    train_split: str = "train"
    """Split to train on, where ``games`` is a folder with splits."""
    eval_split: str | None = "valid_seen"
    """Split to evaluate on, where ``games`` is a folder with splits; None = all games there, for
    ``evaluate`` only."""
    task_types: tuple[TaskType, ...] = TASK_TYPES
    """Task types played."""
    max_receptacles: PositiveInt | None = None
    """Leave out loaded games with more receptacles; None = take all."""
    skip_unsolvable: bool = False
    """Leave out games marked unsolvable (an official download has some) instead of refusing
    them."""
    generator: GeneratorSection = GeneratorSection()
    """Size of generated games; read when ``games`` is None."""
    prompt: Literal["compact", "official"] = "compact"
    """``compact``: task and observation only, the answer is the action. ``official``: the paper's
    prompt with admissible actions, <think> and <action> tags."""

    @property
    def task_kinds(self) -> tuple[str, ...]:
        """The task types, each once."""
        return tuple(dict.fromkeys(self.task_types))

    def with_panel(self, source: str) -> Self:
        """All games of a file or folder, or a split: ``FOLDER/SPLIT`` of packed files, or its name
        alone for one of ``games``. A path that is there is a path."""
        path = Path(source).expanduser()
        if path.exists():
            return self.model_copy(update={"games": path, "eval_split": None})
        if path.name != source and path.parent.is_dir():
            return self.model_copy(update={"games": path.parent, "eval_split": path.name})
        if self.games is None or not self.games.expanduser().is_dir():
            raise ConfigError(
                f"--panel {source}: no such file or folder, and no split, since env.games is "
                f"{self.games}; give a file or folder of games, or set env.games to a folder that "
                "has this split"
            )
        return self.model_copy(update={"eval_split": source})
