"""Play as a policy should learn it, for the warm start."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_spear.envs.protocol import TextEnvironment
from megatron_spear.types import Message, Prompt


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

    ``prompt`` and ``seed`` say which task: an environment that is reset to it and given the same
    actions answers the same and is won (`testing.families` plays it again).

    Example: turns ``("You are in .. put a mug in desk.", "go to desk 4", False)``, ``("Nothing
    happens.", "go to shelf 1", True)``, ...
    """

    turns: tuple[DemonstrationTurn, ...]
    messages: tuple[Message, ...] = ()
    prompt: Prompt | None = None
    seed: int = 0


Player = Callable[[str, Mapping[str, Any], tuple[DemonstrationTurn, ...]], tuple[str, bool]]
"""(observation, info, turns so far) -> (next action, whether it is one to learn)."""


def play_demonstration(
    environment: TextEnvironment,
    prompt: Prompt,
    player: Player,
    *,
    max_turns: int,
    seed: int = 0,
    admissible: bool = False,
) -> Demonstration | None:
    """What ``player`` does in the prompt's task; None unless it is won within ``max_turns``.

    ``admissible`` asks the environment for its possible actions, for views that show them.
    """
    options = {"admissible": admissible, **prompt.metadata}
    observation, info = environment.reset(seed=seed, options=options)
    turns: tuple[DemonstrationTurn, ...] = ()
    while len(turns) < max_turns:
        action, trained = player(observation, info, turns)
        shown = {"admissible": info["admissible"]} if "admissible" in info else {}
        turns = (*turns, DemonstrationTurn(observation, action, trained, shown))
        observation, _, terminated, truncated, info = environment.step(action)
        if terminated or truncated:
            won = bool(info.get("won", False))
            return Demonstration(turns, prompt.messages, prompt, seed) if won else None
    return None


def patience(rng: random.Random, mean: float, most: int) -> int:
    """A geometric number with this mean, cut at ``most``: how long one looks around."""
    if mean <= 0.0:
        return 0
    return min(most, int(math.log(1.0 - rng.random()) / math.log(mean / (1.0 + mean))))
