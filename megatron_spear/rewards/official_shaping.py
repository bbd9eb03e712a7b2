"""Rewards of the official agent tasks, as they lie on token rows (one row a turn).

``algorithm.compat: official`` puts the whole shaped reward of a trajectory on the last response
token of every one of its turns. All functions return new float32 arrays ``[B, T]`` or ``[B]``.
"""

import numpy as np
import numpy.typing as npt

from megatron_spear.types import BoolArray, FloatArray, TokenArray


def survival_bonus(num_turns: npt.ArrayLike) -> FloatArray:
    """float32 ``[B]``: 0.1 for each turn of the trajectory, at most 1, before the weight mu.

    It is paid for turns survived, won or not.
    """
    bonus: FloatArray = np.minimum(0.1 * np.asarray(num_turns, np.float32), 1.0).astype(np.float32)
    return bonus


def official_turn_rewards(
    env_rewards: npt.ArrayLike,
    num_turns: npt.ArrayLike,
    intrinsic_weight: float,
    *,
    normalize_by_length: bool = False,
) -> FloatArray:
    """float32 ``[B]``: the trajectory's reward and its bonus times mu, the same for each turn.

    ``normalize_by_length`` divides the environment's reward, not the bonus, by the turns.
    Example: reward 10, 29 turns, mu 1: 11; normalised 10 / 29 + 1 = 1.345.
    """
    rewards: FloatArray = np.asarray(env_rewards, np.float32)
    if normalize_by_length:
        rewards = (rewards / np.asarray(num_turns, np.float32)).astype(np.float32)
    return (rewards + intrinsic_weight * survival_bonus(num_turns)).astype(np.float32)


def on_last_token(values: FloatArray, num_tokens: TokenArray, width: int) -> FloatArray:
    """float32 ``[B, width]``: ``values[b]`` on token ``num_tokens[b] - 1``, 0 elsewhere.

    A row without response tokens has it on the last column of the padding, as an index of -1 says.
    Example: values [2, 3], tokens [1, 3], width 3 give [[2, 0, 0], [0, 0, 3]].
    """
    num_tokens = np.asarray(num_tokens)
    assert ((num_tokens >= 0) & (num_tokens <= width)).all(), "a row has 0 to width response tokens"
    rows = np.zeros((len(values), width), np.float32)
    rows[np.arange(len(values)), num_tokens - 1] = values
    return rows


def penalize_invalid(
    token_rewards: FloatArray,
    num_tokens: TokenArray,
    valid: BoolArray,
    penalty: float,
    turn_returns: FloatArray | None = None,
) -> tuple[FloatArray, FloatArray | None, float]:
    """Rewards ``[B, T]`` and turn returns ``[B]`` less ``penalty`` on invalid rows; valid share.

    The reward loses it on the row's last response token, the return as a whole. The inputs are left
    as they are. Example: a won turn of reward 10 without ``<action>`` keeps 9.9 at penalty 0.1.
    """
    cost = np.where(np.asarray(valid, np.bool_), 0.0, penalty).astype(np.float32)
    rewards = np.asarray(token_rewards, np.float32)
    rewards = rewards - on_last_token(cost, num_tokens, rewards.shape[1])
    returns = None if turn_returns is None else np.asarray(turn_returns, np.float32) - cost
    return rewards, returns, float(np.mean(valid)) if len(valid) else 1.0
