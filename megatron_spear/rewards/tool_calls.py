"""What tool calls earn (SPEAR Eq. 15), before the weight mu(t).

The default pays for *successful, distinct* calls: a call that failed, or that says again what an
earlier one said, earns nothing, so calling for the sake of calling does not pay. The two official
recipes count the messages that carry calls, whatever came of them.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from megatron_spear.config.method import Schedule
from megatron_spear.curriculum.schedules import DECAYS
from megatron_spear.types import ToolCall

WeightMode = Schedule | Literal["none"]
Recipe = Literal["linear", "qwen3"]
RetoolVariant = Literal["turns", "any_tool", "any_tool_or_turns"]

_TURN_BONUS = 0.1


def tool_reward(calls: Sequence[ToolCall], per_call: float = 0.1, maximum: float = 1.0) -> float:
    """``per_call`` for each successful call unlike all successful ones before, at most ``maximum``.

    Example: three calls, of which the second failed and the third repeats the first, give 0.1.
    """
    distinct = {(call.name, call_key(call.arguments)) for call in calls if call.succeeded}
    return min(per_call * len(distinct), maximum)


def call_key(arguments: str) -> str:
    """Arguments without what is free to vary: key order, spacing, empty and comment lines.

    Example: ``{"code": "# try 2\\nprint(1)\\n"}`` and ``{"code": "print(1)"}`` have one key.
    """
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = arguments
    try:
        return json.dumps(_plain(parsed), sort_keys=True)
    except RecursionError:  # nested deeper than anybody writes: taken as it stands
        return arguments


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _plain_text(value) if isinstance(value, str) else value


def _plain_text(text: str) -> str:
    """Lines without blanks at their end; empty and comment lines left out; indentation kept."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))


def official_weight(mode: WeightMode, step: int, max_steps: int) -> float:
    """mu at ``step`` (1-based): 0 for ``none``, 1 for ``constant``, Eq. 14 for ``cosine``."""
    return 0.0 if mode == "none" else DECAYS[mode](step, max_steps)


def official_tool_reward(
    num_calls: int,
    outcome: float,
    recipe: Recipe,
    *,
    tools_available: bool = True,
    per_call: float = 0.1,
    maximum: float = 1.0,
) -> float:
    """The official intrinsic part; ``num_calls`` counts assistant messages with tool calls.

    - ``linear`` (Qwen2.5): min(per_call * calls, maximum), whatever the outcome.
    - ``qwen3``: the same where the outcome is 0 or less; a right answer gets 1 for any call at all.

    Example: 3 calls give 0.3, and 1.0 in ``qwen3`` with outcome 1. Without tools it is 0.
    """
    if not tools_available or num_calls == 0:
        return 0.0
    if recipe == "qwen3" and outcome > 0:
        return 1.0
    return min(per_call * num_calls, maximum)


def official_retool_reward(correct: bool, num_turns: int, variant: RetoolVariant) -> float:
    """Outcome (+1 / -1) with ReTool's turn shaping, which has no schedule.

    ``num_turns`` counts messages; the first two are the prompt and the first answer. What a wrong
    answer may win back never lifts it above 0:

    - ``turns``: wrong answers get 0.1 for each two messages beyond two.
    - ``any_tool``: any answer gets 1 once there is more than that first exchange.
    - ``any_tool_or_turns``: right answers as in ``any_tool``, wrong ones as in ``turns``.

    Example (6 messages): 1 or -0.8; 2 or 0; 2 or -0.8.
    """
    used_tools = num_turns > 2
    if correct:
        return 2.0 if used_tools and variant != "turns" else 1.0
    if variant == "any_tool":
        return 0.0 if used_tools else -1.0
    return min(0.0, -1.0 + _TURN_BONUS * (num_turns - 2) / 2)
