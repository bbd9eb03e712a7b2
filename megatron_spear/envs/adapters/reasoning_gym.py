"""reasoning-gym's questions: one turn, scored by the data set's own scorer."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from megatron_spear.envs.adapters.adapted import AdaptedEnvironment, Reply
from megatron_spear.envs.adapters.library import library
from megatron_spear.errors import ConfigError, describe


class ReasoningGymEnvironment(AdaptedEnvironment):
    """Asks question ``options["index"]`` of the data set ``options["dataset"]``; the action is the
    answer, the reward its score from 0 to 1.

    Some scorers raise on answers that they cannot read: those get score 0 and are not valid.
    """

    def __init__(
        self, datasets: Mapping[str, Mapping[str, Any]], size: int, seed: int, won_at: float
    ) -> None:
        super().__init__(won_at)
        self._datasets, self._size, self._seed = datasets, size, seed
        self._dataset: Any = None
        self._entry: Mapping[str, Any] = {}

    def _begin(self, seed: int, options: Mapping[str, Any]) -> str:
        name = options["dataset"]
        self._dataset = open_dataset(name, self._datasets[name], self._size, self._seed)
        self._entry = self._dataset[options["index"]]
        return str(self._entry["question"])

    def _act(self, action: str) -> Reply:
        try:
            score = float(self._dataset.score_answer(action.strip(), self._entry))
        except Exception:  # noqa: BLE001 - scorers read the text of a model with whatever parser
            return Reply("The answer cannot be read.", 0.0, True, False, valid=False)
        return Reply(f"The score is {score:g}.", score, True, False)


def open_dataset(name: str, arguments: Mapping[str, Any], size: int, seed: int) -> Any:
    """A data set, made once in a process. Raises ConfigError for an unknown name or argument."""
    return _opened(name, json.dumps(arguments, sort_keys=True), size, seed)


@functools.lru_cache(maxsize=256)
def _opened(name: str, arguments: str, size: int, seed: int) -> Any:
    create = library("reasoning_gym").create_dataset
    try:
        return create(name, size=size, seed=seed, **json.loads(arguments))
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"env.datasets.{name}: {describe(error)}; reasoning-gym's documentation lists data "
            "sets and their settings"
        ) from error
