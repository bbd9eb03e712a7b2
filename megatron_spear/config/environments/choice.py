"""The environments there are."""

from typing import Annotated

from pydantic import Field

from megatron_spear.config.environments.adapters import (
    GemSection,
    GymnasiumSection,
    ReasoningGymSection,
    SkyrlGymSection,
    VerifiersSection,
)
from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.config.environments.custom import CustomSection
from megatron_spear.config.environments.math_code import MathCodeSection
from megatron_spear.config.environments.webshop import WebshopSection

AnyEnvironment = Annotated[
    AlfworldSection
    | CustomSection
    | GemSection
    | GymnasiumSection
    | MathCodeSection
    | ReasoningGymSection
    | SkyrlGymSection
    | VerifiersSection
    | WebshopSection,
    Field(discriminator="type"),
]
"""Any of them, chosen by ``type``."""
