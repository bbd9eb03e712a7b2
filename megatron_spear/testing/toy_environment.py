"""A corridor to walk: the smallest text environment, for tests and as a pattern for new ones."""

import os
import random
import time
from collections.abc import Mapping
from typing import Any

from megatron_spear.envs.protocol import StepResult, TextEnvironment


class CorridorEnvironment(TextEnvironment):
    """Walk ``left`` and ``right`` from a drawn place to the far end; reward 1.0 there.

    Options of ``reset``: ``length`` (places, default 4), ``start`` (default: drawn from the seed).
    """

    def __init__(self) -> None:
        self._place = self._goal = 0
        self._length = 4

    def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Draw start and goal from the seed; the goal is the far end."""
        self._length = int(options.get("length", 4))
        self._goal = self._length - 1
        start = options.get("start")
        self._place = random.Random(seed).randrange(self._goal) if start is None else int(start)
        return f"walk to place {self._goal} {self._where()}", self._info(valid=True)

    def step(self, action: str) -> StepResult:
        """Move one place; anything else, and walking into a wall, changes nothing."""
        move = {"left": -1, "right": 1}.get(action.strip().lower(), 0)
        target = self._place + move
        valid = move != 0 and 0 <= target < self._length
        if valid:
            self._place = target
        won = self._place == self._goal
        observation = self._where() if valid else "nothing happens"
        call = {"name": "walk", "arguments": action.strip().lower(), "succeeded": valid}
        info = {**self._info(valid=valid), "tool_calls": [call]}
        return StepResult(observation, float(won), won, False, info)

    def close(self) -> None:
        """Nothing is held."""

    def _where(self) -> str:
        return f"you are at place {self._place}"

    def _info(self, *, valid: bool) -> dict[str, Any]:
        return {
            "won": self._place == self._goal,
            "valid": valid,
            "anchor": self._where(),
            "admissible": ["left", "right"],
        }


class FaultyCorridor(CorridorEnvironment):
    """A corridor that breaks on request, by action; ``options["first"]`` is taken at reset.

    ``crash`` raises, ``hang`` sleeps for an hour, ``exit`` ends the worker process, ``lambda``
    answers with an info that cannot be pickled, ``calls`` with a tool call that is none,
    ``modules`` with the names of the imported modules and the process id as info, ``pid`` with that
    id as observation.
    """

    def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """As the corridor's, after the first action."""
        if "first" in options:
            self.step(options["first"])
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> StepResult:
        """As the corridor's, but for the faults."""
        if action == "crash":
            raise KeyError("the floor gave way")
        if action == "hang":
            time.sleep(3600)
        if action == "exit":
            os._exit(3)
        result = super().step(action)
        if action == "calls":
            return result._replace(info={**result.info, "tool_calls": [1]})
        if action == "lambda":
            return result._replace(info={"hidden": lambda: None})
        if action == "modules":
            import sys

            return result._replace(info={"modules": sorted(sys.modules), "pid": os.getpid()})
        return result._replace(observation=str(os.getpid())) if action == "pid" else result
