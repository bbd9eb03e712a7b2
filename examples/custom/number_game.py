"""Guess a number: an environment, its family and the demonstrations of its warm start in one file.

The first observation is ``A number from 4 to 19.``, an answer is ``11``, and the environment says
``The number is higher than 11.`` until it is found or the guesses are used up.
"""

import random
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from megatron_spear.config.base import PositiveInt
from megatron_spear.envs.demonstration import DemonstrationTurn
from megatron_spear.envs.family import EnvironmentFamily
from megatron_spear.envs.protocol import StepResult, TextEnvironment
from megatron_spear.envs.simple import SimpleFamily
from megatron_spear.errors import EnvironmentFault


class GuessEnvironment(TextEnvironment):
    """Reward 1.0 for the right number; over after ``guesses`` answers."""

    def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        self.task, self.left = dict(options), int(options["guesses"])
        return f"A number from {self.task['low']} to {self.task['high']}.", {"won": False}

    def step(self, action: str) -> StepResult:
        if self.left == 0:
            raise EnvironmentFault("the game is over; call reset")
        low, high, number = (self.task[name] for name in ("low", "high", "number"))
        text = action.strip()
        # Nothing longer is turned into a number: the text of a model is anybody's.
        guess = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else None
        valid, won = guess is not None and low <= guess <= high, guess == number
        self.left = 0 if won else self.left - 1
        if won:
            observation = "Found."
        elif not valid:
            observation = f"Say a number from {low} to {high}."
        else:
            side = "higher" if number > guess else "lower"
            observation = f"The number is {side} than {guess}."
        info = {"won": won, "valid": valid}
        return StepResult(observation, float(won), won, self.left == 0 and not won, info)

    def close(self) -> None:
        pass


class NumberGame(SimpleFamily):
    """Ranges of 2 to ``width`` numbers, up to ``highest``."""

    environment = GuessEnvironment
    slips = ("0",)

    class Settings(EnvironmentFamily.Settings):
        highest: PositiveInt = 20
        """No number is above it."""
        width: Annotated[int, Field(ge=2)] = 16
        """Most numbers to choose from."""
        guesses: PositiveInt = 6
        """Answers before the game is lost."""

        @model_validator(mode="after")
        def _fits(self) -> "NumberGame.Settings":
            if self.width > self.highest:
                raise ValueError(f"width={self.width} is above highest={self.highest}; lower it")
            return self

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        numbers = [str(number) for number in range(settings.highest + 1)]
        text = "A number from to The is higher lower than Say a Found"
        self.words = (*numbers, *text.split())

    def make_task(self, rng: random.Random) -> dict[str, Any]:
        size = rng.randint(2, self.settings.width)
        low = rng.randint(1, self.settings.highest - size + 1)
        number = rng.randint(low, low + size - 1)
        high, guesses = low + size - 1, self.settings.guesses
        return {"low": low, "high": high, "number": number, "guesses": guesses}

    def expert(
        self, task: Mapping[str, Any], observation: str, turns: tuple[DemonstrationTurn, ...]
    ) -> str:
        """Halves what is left."""
        low, high = task["low"], task["high"]
        for guess in (int(turn.action) for turn in turns):
            if task["number"] > guess >= low:
                low = guess + 1
            elif task["number"] < guess <= high:
                high = guess - 1
        return str((low + high) // 2)
