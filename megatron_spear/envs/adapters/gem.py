"""GEM's environments: text in and text out, a five-tuple, draws from the global ``random``."""

from collections.abc import Mapping
from typing import Any

from megatron_spear.envs.adapters.adapted import AdaptedEnvironment, Reply
from megatron_spear.envs.adapters.library import library


class GemEnvironment(AdaptedEnvironment):
    """``gem.make(id, **arguments)``, made anew for each task, of which ``options`` has the seed.

    The ``suffix`` that GEM's own wrappers put behind an observation is put there too.
    """

    def __init__(self, id: str, arguments: Mapping[str, Any], won_at: float) -> None:
        super().__init__(won_at)
        self._id, self._arguments = id, dict(arguments)
        self._gem = library("gem")
        self._environment: Any = None

    def _begin(self, seed: int, options: Mapping[str, Any]) -> str:
        self._environment = self._gem.make(self._id, **self._arguments)
        observation, info = self._environment.reset(seed=seed)
        return _with_suffix(observation, info)

    def _act(self, action: str) -> Reply:
        observation, reward, terminated, truncated, info = self._environment.step(action)
        ended = bool(terminated or truncated)
        shown = str(observation) if ended else _with_suffix(observation, info)
        return Reply(shown, float(reward), bool(terminated), bool(truncated))


def _with_suffix(observation: Any, info: Mapping[str, Any]) -> str:
    suffix = info.get("suffix")
    return f"{observation}\n{suffix}" if suffix else str(observation)
