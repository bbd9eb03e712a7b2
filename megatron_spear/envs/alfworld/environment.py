"""ALFWorld as a text environment: one game per reset, text in and text out."""

from collections.abc import Mapping
from typing import Any

from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.game import GameFile, GameState, parse_game
from megatron_spear.envs.alfworld.rules import WELCOME_TEXT
from megatron_spear.envs.alfworld.text import intro
from megatron_spear.envs.protocol import StepResult, TextEnvironment
from megatron_spear.errors import DataError, EnvironmentFault


class AlfworldEnvironment(TextEnvironment):
    """Plays the game in ``options["game"]``; reward 1.0 on the turn that reaches the goal, else
    0.0.

    Options of `reset`:
        game: the fields of a `GameFile` as a plain dict (`GameFile.to_fields`).
        admissible: put the sorted possible actions into ``info["admissible"]`` (about 10 us a
        turn).

    ``info`` holds ``won``, ``valid``, ``anchor`` and, when asked for, ``admissible``; after a step
    also ``tool_calls``, the action as one call that succeeded if it was valid. The anchor is the
    observation with the agent's place and hand, so that equal anchors mean equal sights for
    GiGPO::

        On the desk 1, you see a mug 2.
        [at desk 1; holding nothing]
    """

    def __init__(self) -> None:
        self._state: GameState | None = None
        self._lists_admissible = False
        self._finished = False

    def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Start a game; ``seed`` changes nothing, because a game has no chance in it.

        Raises `DataError` for a game that cannot be played.
        """
        values = options.get("game")
        if not isinstance(values, Mapping):
            got = type(values).__name__
            raise DataError(f"options['game'] is a {got}; expected a GameFile's fields as a dict.")
        game = parse_game(GameFile.from_fields(values, f"game {values.get('id')}"))
        self._state = GameState(game)
        self._lists_admissible = bool(options.get("admissible", False))
        self._finished = False
        observation = intro(self._state).removeprefix(WELCOME_TEXT)
        return observation, self._info(self._state, observation, won=self._state.won, valid=True)

    def step(self, action: str) -> StepResult:
        """Apply one action; white space around it does not count."""
        state = self._state
        if state is None or self._finished:
            raise EnvironmentFault(
                "step outside a game: call reset before the first and after the last turn."
            )
        reply = act(state, action)
        won = self._finished = state.won
        info = self._info(state, reply.feedback, won=won, valid=reply.valid)
        call = {"name": "act", "arguments": action.strip(), "succeeded": reply.valid}
        info["tool_calls"] = [call]
        return StepResult(reply.feedback, float(won), won, False, info)

    def close(self) -> None:
        """Forget the game."""
        self._state = None

    def _info(
        self, state: GameState, observation: str, *, won: bool, valid: bool
    ) -> dict[str, Any]:
        info: dict[str, Any] = {"won": won, "valid": valid, "anchor": _anchor(state, observation)}
        if self._lists_admissible:
            info["admissible"] = admissible_actions(state)
        return info


def _anchor(state: GameState, observation: str) -> str:
    names = state.game.names
    here = ", ".join(names[place] for place in state.game.receptacles_at.get(state.location, ()))
    holding = names[state.held] if state.held is not None else "nothing"
    return f"{observation}\n[at {here or 'the middle of the room'}; holding {holding}]"
