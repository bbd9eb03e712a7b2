"""Play as a policy should learn it, for the warm start."""

import math
import random
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


def patience(rng: random.Random, mean: float, most: int) -> int:
    """A geometric number with this mean, cut at ``most``: how long one looks around."""
    if mean <= 0.0:
        return 0
    return min(most, int(math.log(1.0 - rng.random()) / math.log(mean / (1.0 + mean))))
