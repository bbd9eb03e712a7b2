"""SkyRL Gym's environments: chat messages out, text in, a row of data for each task."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_spear.envs.adapters.adapted import AdaptedEnvironment, Reply
from megatron_spear.envs.adapters.library import library


class SkyrlGymEnvironment(AdaptedEnvironment):
    """``skyrl_gym.make(id, env_config, extras=row)`` for ``options["row"]``.

    The first observation is the last message of the conversation that ``init`` gives; the ones
    before it are the prompt's own messages.
    """

    def __init__(self, id: str, arguments: Mapping[str, Any], won_at: float) -> None:
        super().__init__(won_at)
        self._id = id
        self._skyrl = library("skyrl_gym")
        self._config: Any = dict(arguments)
        if arguments:  # environments that read it want attributes
            from omegaconf import OmegaConf

            self._config = OmegaConf.create(dict(arguments))
        self._environment: Any = None

    def _begin(self, seed: int, options: Mapping[str, Any]) -> str:
        self.close()
        row = dict(options["row"])
        prompt = [dict(message) for message in row["prompt"]]
        self._environment = self._skyrl.make(self._id, env_config=self._config, extras=row)
        conversation, _ = self._environment.init(prompt)
        return str(conversation[-1]["content"])

    def _act(self, action: str) -> Reply:
        output = self._environment.step(action)
        observation = _text(output["observations"])
        return Reply(observation, float(output["reward"]), bool(output["done"]), False)

    def close(self) -> None:
        """Close the library's environment."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None


def _text(messages: Sequence[Mapping[str, Any]] | None) -> str:
    return "\n".join(str(message["content"]) for message in messages or ())
