"""Play as a policy should learn it, for the warm start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_spear.types import Message


@dataclass(frozen=True, slots=True)
class DemonstrationTurn:
    """What was read, what was typed, and whether the action is one to learn (slips are not).

    ``info`` holds what the view reads of the environment's info (``admissible``, say).
    """

    observation: str
    action: str
    trained: bool
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One task as it was played, up to the action that ended it; ``messages`` are its prompt's.

    Example: turns ``("You are in .. put a mug in desk.", "go to desk 4", False)``, ``("Nothing
    happens.", "go to shelf 1", True)``, ...
    """

    turns: tuple[DemonstrationTurn, ...]
    messages: tuple[Message, ...] = ()
