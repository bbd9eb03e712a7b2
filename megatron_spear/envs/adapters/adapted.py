"""What the environments of other libraries have in common: hostile text, the end, winning."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_spear.envs.adapters.library import OwnChance
from megatron_spear.envs.protocol import StepResult, TextEnvironment
from megatron_spear.errors import EnvironmentFault

MAX_TEXT = 20_000
"""Characters of a longest action; a longer one is refused before the library reads it."""


class Reply(NamedTuple):
    """What a library answered to an action."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    valid: bool = True


class AdaptedEnvironment(TextEnvironment):
    """An environment of another library, which reads only texts that it can be given.

    An attempt is won when it terminates with a last reward of at least ``won_at``. Texts that are
    empty, longer than `MAX_TEXT`, or hold NUL or half a character (a lone surrogate) are answered
    with valid = False and cost a turn. What the library raises is a fault of the environment.
    """

    def __init__(self, won_at: float = 1.0) -> None:
        self._won_at = won_at
        self._chance = OwnChance()
        self._playing = False

    @abstractmethod
    def _begin(self, seed: int, options: Mapping[str, Any]) -> str:
        """Start a task; its first observation."""

    @abstractmethod
    def _act(self, action: str) -> Reply:
        """What the library answers."""

    def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Start the task of ``options``; where these have a ``seed``, it decides, not the
        argument."""
        seed = int(options.get("seed", seed))
        with self._chance.drawn(seed):
            observation = self._begin(seed, options)
        self._playing = True
        return observation, {"won": False, "valid": True}

    def step(self, action: str) -> StepResult:
        """Give the library the action."""
        if not self._playing:
            raise EnvironmentFault("step outside a task: call reset before, and after its end")
        if not readable(action):
            reply = Reply("This cannot be read; answer again.", 0.0, False, False, valid=False)
        else:
            with self._chance.drawn():
                reply = self._act(action)
        self._playing = not (reply.terminated or reply.truncated)
        won = reply.terminated and reply.reward >= self._won_at
        call = {"name": "act", "arguments": action[:MAX_TEXT], "succeeded": reply.valid}
        info = {"won": won, "valid": reply.valid, "tool_calls": [call]}
        return StepResult(
            reply.observation, float(reply.reward), reply.terminated, reply.truncated, info
        )

    def close(self) -> None:
        """Nothing is held."""


def readable(text: str) -> bool:
    """Whether a text can be handed to code that expects people's texts."""
    if not text.strip() or len(text) > MAX_TEXT:
        return False
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)
