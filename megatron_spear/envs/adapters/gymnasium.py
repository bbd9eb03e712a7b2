"""Gymnasium's environments that can be read and answered in text."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_spear.envs.adapters.adapted import AdaptedEnvironment, Reply
from megatron_spear.envs.adapters.library import library
from megatron_spear.errors import ConfigError


class GymnasiumEnvironment(AdaptedEnvironment):
    """``gymnasium.make(id, **arguments)``; ``options`` has the seed.

    Read: a text observation as it is, else what ``render_mode="ansi"`` draws. Answered: a text of
    a Text space, or the name or number of one of Discrete actions; another text changes nothing
    and is not valid. Raises ConfigError for an environment that is neither.
    """

    def __init__(
        self, id: str, arguments: Mapping[str, Any], actions: Sequence[str], won_at: float
    ) -> None:
        super().__init__(won_at)
        gymnasium = library("gymnasium")
        try:
            self._environment = gymnasium.make(id, **arguments)
        except (gymnasium.error.Error, TypeError, ModuleNotFoundError) as error:
            raise ConfigError(f"env.id={id}: {type(error).__name__}: {error}") from error
        spaces, space = gymnasium.spaces, self._environment.action_space
        self._numbers: dict[str, int] | None = None
        if isinstance(space, spaces.Discrete):
            first, count = int(space.start), int(space.n)
            if actions and len(actions) != count:
                raise ConfigError(
                    f"env.actions: got {len(actions)} names, and {id} has {count} actions; name all"
                )
            names = actions or [str(first + number) for number in range(count)]
            self._numbers = {name.lower(): first + number for number, name in enumerate(names)}
        elif not isinstance(space, spaces.Text):
            raise ConfigError(f"env.id={id}: its actions are {space}, expected Text or Discrete")
        self._drawn = not isinstance(self._environment.observation_space, spaces.Text)
        if self._drawn and self._environment.render_mode != "ansi":
            raise ConfigError(
                f"env.id={id}: its observations are {self._environment.observation_space}, no "
                "text; give env.arguments={render_mode: ansi} if it can be drawn so"
            )

    def _begin(self, seed: int, options: Mapping[str, Any]) -> str:
        observation, _ = self._environment.reset(seed=seed)
        return self._read(observation)

    def _act(self, action: str) -> Reply:
        taken: Any = action
        if self._numbers is not None:
            taken = self._numbers.get(action.strip().lower())
        if taken is None or not self._environment.action_space.contains(taken):
            known = "" if self._numbers is None else f" It is one of {', '.join(self._numbers)}."
            return Reply(f"This is no action.{known}", 0.0, False, False, valid=False)
        observation, reward, terminated, truncated, _ = self._environment.step(taken)
        return Reply(self._read(observation), float(reward), bool(terminated), bool(truncated))

    def close(self) -> None:
        """Close the library's environment."""
        self._environment.close()

    def _read(self, observation: Any) -> str:
        return str(self._environment.render() if self._drawn else observation)
