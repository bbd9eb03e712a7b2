"""Settings of environments that other libraries bring (docs/environments.md)."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_spear.config.base import NonNegativeInt, PositiveInt
from megatron_spear.config.environments.base import EnvironmentSection


class AdapterSection(EnvironmentSection):
    """What the adapters share."""

    won_at: float = 1.0
    """Least reward of the last turn that counts as won."""


class ReasoningGymSection(AdapterSection):
    """Questions of reasoning-gym's generators, answered in one turn.

    Example: ``{type: reasoning_gym, datasets: {chain_sum: {max_terms: 3}, leg_counting: {}}}``.
    """

    type: Literal["reasoning_gym"] = "reasoning_gym"
    """Which environment."""
    datasets: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """The data sets by name, each with the fields of its own configuration that differ."""
    size: PositiveInt = 10_000
    """Questions of each data set."""
    seed: NonNegativeInt = 0
    """Seed of the questions."""

    @property
    def task_kinds(self) -> tuple[str, ...]:
        """The data sets."""
        return tuple(self.datasets)


class GymSection(AdapterSection):
    """What gymnasium and GEM share: an environment by its id, a new one for each seed."""

    id: str
    """The environment's id, ``FrozenLake-v1`` say; ``module:Id-v0`` imports a module before."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its ``make``."""


class GymnasiumSection(GymSection):
    """Gymnasium environments in text: text observations (or ``render_mode: ansi``), and actions
    that are texts or can be named."""

    type: Literal["gymnasium"] = "gymnasium"
    """Which environment."""
    actions: tuple[str, ...] = ()
    """Names of discrete actions, the first one for action 0; () = their numbers are written."""


class GemSection(GymSection):
    """Games, questions and tools of GEM (gem-llm)."""

    type: Literal["gem"] = "gem"
    """Which environment."""


class SkyrlGymSection(AdapterSection):
    """Environments of SkyRL Gym with rows of their data."""

    type: Literal["skyrl_gym"] = "skyrl_gym"
    """Which environment."""
    id: str
    """The environment's id, ``gsm8k_multi_turn`` say."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Its ``env_config``."""
    train_file: Path
    """Rows to train on, JSON lines with ``prompt`` (messages), ``reward_spec`` and so on."""
    eval_file: Path
    """Rows of the panel."""


class VerifiersSection(AdapterSection):
    """Tasks of a verifiers (v1) taskset, answered in one turn and scored by their rewards."""

    type: Literal["verifiers"] = "verifiers"
    """Which environment."""
    taskset: str
    """The taskset's id: an installed package that exports it."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the taskset's configuration."""
    num_tasks: PositiveInt = 1000
    """First tasks taken; a taskset may be endless."""
