"""A kind of task as a whole: who plays it, how it is shown, where its prompts come from.

``env.type`` of the settings names one. All that the trainer knows of ALFWorld, WebShop, math or an
environment of the user's own goes through this class.
"""

import functools
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_spear.config.base import Section
from megatron_spear.config.environments.base import EnvironmentSection
from megatron_spear.config.schema import SftSection
from megatron_spear.data.prompts import PromptSource, prompts_sha256
from megatron_spear.envs.demonstration import Demonstration
from megatron_spear.envs.views import AgentView
from megatron_spear.errors import ConfigError
from megatron_spear.types import Prompt


@dataclass(frozen=True)
class Panel:
    """A fixed list of prompts to evaluate on; ``sha256`` is of their ids and contents, in order."""

    prompts: tuple[Prompt, ...]
    sha256: str

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> "Panel":
        """The panel of these prompts. Raises DataError unless their metadata are JSON values."""
        return cls(tuple(prompts), prompts_sha256(prompts))


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer of a tiny model is made of (``conversion.word_tokenizer``)."""

    words: tuple[str, ...]
    phrases: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    single_digits: bool = False


class EnvironmentFamily(ABC):
    """Made from its section of the settings, in the trainer and again in worker processes.

    One of the user's own (``env.type=custom``) is made as ``MyFamily(settings)``, or as
    ``MyFamily()`` where it declares no ``Settings``; `envs.simple.SimpleFamily` is a shorter way.
    """

    class Settings(Section):
        """No settings; a user's family that has some derives its ``Settings`` from this."""

    factory: str
    """``package.module:callable`` or ``/FOLDER/FILE.py:callable`` that makes one environment in a
    worker, of ``factory_options``."""

    task_kinds: tuple[str, ...] = ()
    """The kinds of tasks that can be drawn apart from each other, where the section does not say
    them (``env.type=custom``)."""

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
    def panel(self, size: int | None, made_seed: int) -> Panel:
        """``size`` prompts to evaluate on, which are never trained on and the same on every
        machine; None = all that are loaded, sorted by id. Raises DataError where there are fewer,
        ConfigError for all of prompts that are made."""

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
    "custom": "megatron_spear.envs.custom:custom_family",
    "math_code": "megatron_spear.envs.math_code.family:MathCodeFamily",
    "gem": "megatron_spear.envs.adapters.family:GemFamily",
    "gymnasium": "megatron_spear.envs.adapters.family:GymnasiumFamily",
    "reasoning_gym": "megatron_spear.envs.adapters.family:ReasoningGymFamily",
    "skyrl_gym": "megatron_spear.envs.adapters.family:SkyrlGymFamily",
    "verifiers": "megatron_spear.envs.adapters.family:VerifiersFamily",
    "webshop": "megatron_spear.envs.webshop.family:WebshopFamily",
}
"""The class for each ``env.type``, imported when it is needed."""


def family_of(section: EnvironmentSection) -> EnvironmentFamily:
    """The family that a section of the settings describes; made once in a process.

    Raises ConfigError where it cannot be made.
    """
    return _made(_Key(section, section.model_dump_json(), os.getcwd()))


@dataclass(frozen=True)
class _Key:
    """A section by its values, which may hold maps, and by where its relative paths start."""

    section: EnvironmentSection = field(compare=False)
    values: str
    folder: str


@functools.lru_cache(maxsize=4)
def _made(key: _Key) -> EnvironmentFamily:
    name: str = key.section.type  # type: ignore[attr-defined]  # of every kind of section
    module, _, attribute = _FAMILIES[name].partition(":")
    made: EnvironmentFamily = getattr(importlib.import_module(module), attribute)(key.section)
    return made
