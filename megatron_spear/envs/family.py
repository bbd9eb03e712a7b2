"""A kind of task as a whole: who plays it, how it is shown, where its prompts come from.

``env.type`` of the settings names one. All that the trainer knows of ALFWorld, WebShop, math or an
environment of the user's own goes through this class.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_spear.config.environments.base import EnvironmentSection
from megatron_spear.config.schema import SftSection
from megatron_spear.data.prompts import PromptSource
from megatron_spear.envs.demonstration import Demonstration
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import ConfigError
from megatron_spear.types import Prompt


@dataclass(frozen=True)
class Panel:
    """A fixed list of prompts to evaluate on; ``sha256`` is of their ids and contents, in order."""

    prompts: tuple[Prompt, ...]
    sha256: str


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer of a tiny model is made of (``conversion.word_tokenizer``)."""

    words: tuple[str, ...]
    phrases: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


class EnvironmentFamily(ABC):
    """Made from its section of the settings, in the trainer and again in worker processes."""

    factory: str
    """``package.module:callable`` that makes one environment in a worker, of
    ``factory_options``."""

    @property
    def factory_options(self) -> Mapping[str, Any]:
        """Keyword arguments of the factory, picklable."""
        return {}

    @abstractmethod
    def view(self) -> AgentView:
        """How the environment is shown to the policy."""

    @abstractmethod
    def training(self, order_seed: int, made_seed: int) -> PromptSource:
        """The prompts to train on: loaded ones in an order drawn from ``order_seed``, or ones that
        are made from ``made_seed``. Raises DataError for data that cannot be used."""

    def training_by_kind(self, order_seed: int, made_seed: int) -> Mapping[str, PromptSource]:
        """The same by kind (``Prompt.kind``), for those of the section's ``task_kinds`` that have
        prompts."""
        raise ConfigError(
            f"{type(self).__name__} has one kind of task; set curriculum.tasks.enabled=false"
        )

    @abstractmethod
    def panel(self, size: int, made_seed: int) -> Panel:
        """``size`` prompts to evaluate on, which are never trained on and the same on every
        machine. Raises DataError where there are fewer."""

    def demonstration(self, section: SftSection, made_seed: int, index: int) -> Demonstration:
        """Demonstration ``index`` of a warm start, which depends on nothing but the arguments.

        Made in a process without torch. Raises DataError where there is none to give.
        """
        raise ConfigError(
            f"{type(self).__name__} has no demonstrations for a warm start; set sft.enabled=false"
        )

    def vocabulary(self) -> Vocabulary:
        """The words of the tasks, for the tokenizer of a tiny model."""
        raise ConfigError(
            f"{type(self).__name__} has no word list for a tiny model's tokenizer; set model.path"
        )

    def contents(self) -> Mapping[str, str]:
        """Setting -> sha256 of the data that it names, so that a warm start made from other data
        under the same name is not taken for this one's."""
        return {}


_FAMILIES = {
    "alfworld": "megatron_spear.envs.alfworld.family:AlfworldFamily",
    "webshop": "megatron_spear.envs.webshop.family:WebshopFamily",
}
"""The class for each ``env.type``, imported when it is needed."""


def family_of(section: EnvironmentSection) -> EnvironmentFamily:
    """The family that a section of the settings describes."""
    name: str = section.type  # type: ignore[attr-defined]  # of every kind of section
    module, _, attribute = _FAMILIES[name].partition(":")
    made: EnvironmentFamily = getattr(importlib.import_module(module), attribute)(section)
    return made
