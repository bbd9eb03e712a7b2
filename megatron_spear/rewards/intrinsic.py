"""The intrinsic reward of a trajectory (SPEAR Eq. 15), before its weight mu(t).

| ``reward.intrinsic.type`` | pays | source |
|---|---|---|
| ``distinct_calls`` | ``per_call`` for each successful call unlike those before, up to ``max`` | |
| ``official_linear`` | 0.1 for each turn with calls, at most 1 | released code, Qwen2.5 |
| ``official_qwen3`` | the same where the outcome is 0 or less, else 1 for any call | Qwen3 |
| ``official_steps`` | 0.1 for each turn survived, at most 1 | released code, agents |
| ``none`` | nothing | |
"""

from collections.abc import Sequence

from megatron_spear.config.method import DistinctCallsSection, IntrinsicSection
from megatron_spear.rewards.official_shaping import survival_bonus
from megatron_spear.rewards.tool_calls import Recipe, official_tool_reward, tool_reward
from megatron_spear.types import Turn

_RECIPES: dict[str, Recipe] = {"official_linear": "linear", "official_qwen3": "qwen3"}


def intrinsic_reward(turns: Sequence[Turn], outcome: float, section: IntrinsicSection) -> float:
    """What the turns of one trajectory earn besides its ``outcome``.

    ``distinct_calls`` leaves out the calls of invalid turns, those in a form that was not asked for
    too; the released code's rewards count every turn.

    Example: "look", "look", "take pen 1" and "fly", the last invalid, and outcome 1:
    ``distinct_calls`` 0.02, ``official_linear`` and ``official_steps`` 0.4, ``official_qwen3`` 1.
    """
    if isinstance(section, DistinctCallsSection):
        calls = [call for turn in turns if turn.valid for call in turn.tool_calls]
        return tool_reward(calls, section.per_call, section.max)
    if section.type == "none":
        return 0.0
    if section.type == "official_steps":
        return float(survival_bonus(len(turns)))
    num_calling = sum(bool(turn.tool_calls) for turn in turns)
    return official_tool_reward(num_calling, outcome, _RECIPES[section.type])
