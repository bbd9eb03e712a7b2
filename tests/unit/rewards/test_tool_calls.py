"""What tool calls earn: distinct successes by default, mere counts in the official recipes."""

import json
import random

import pytest

from megatron_spear.rewards.tool_calls import (
    call_key,
    official_retool_reward,
    official_tool_reward,
    official_weight,
    tool_reward,
)
from megatron_spear.types import ToolCall


def _call(code: str, *, succeeded: bool = True, name: str = "python") -> ToolCall:
    return ToolCall(name=name, arguments=json.dumps({"code": code}), succeeded=succeeded)


def test_only_distinct_successes_are_paid() -> None:
    calls = [_call("print(1)"), _call("print(", succeeded=False), _call("print(1)\n")]
    assert tool_reward(calls) == pytest.approx(0.1)
    assert tool_reward([_call("1/0", succeeded=False)] * 20) == 0.0
    assert tool_reward([*calls, _call("print(2)")]) == pytest.approx(0.2)
    assert tool_reward([_call("1"), _call("1", name="search")]) == pytest.approx(0.2)


def test_a_failed_call_does_not_use_up_the_later_success() -> None:
    assert tool_reward([_call("f()", succeeded=False), _call("f()")]) == pytest.approx(0.1)


def test_reward_is_capped_and_never_falls_with_more_calls() -> None:
    draw = random.Random(0)
    calls = [_call(f"print({i % 30})", succeeded=draw.random() < 0.5) for i in range(200)]
    paid = [tool_reward(calls[:count]) for count in range(len(calls) + 1)]
    assert paid[0] == 0.0 and paid[-1] == 1.0
    assert paid == sorted(paid)
    assert tool_reward(calls, per_call=0.5, maximum=0.7) == 0.7
    assert tool_reward(calls[::-1]) == tool_reward(calls)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}', True),
        ('{"code": "# try 2\\nprint(1)\\n\\n"}', '{"code": "print(1)"}', True),
        ('{"code": "if x:\\n  f()"}', '{"code": "if x:\\nf()"}', False),
        ('{"code": "print(1)"}', '{"code": "print(2)"}', False),
        ("print(1)  ", "print(1)", True),
        ("1", '"1"', False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
    ],
)
def test_call_key(left: str, right: str, same: bool) -> None:
    assert (call_key(left) == call_key(right)) is same


def test_hostile_arguments_have_a_key() -> None:
    assert call_key("[" * 100_000) == call_key("[" * 100_000)
    assert call_key('{"a": ' * 5000 + "1" + "}" * 5000)
    assert call_key("1" * 10_000) == call_key("1" * 10_000)


def test_official_recipes_by_hand() -> None:
    assert official_tool_reward(3, -1.0, "qwen3") == pytest.approx(0.3)
    assert official_tool_reward(3, 0.0, "qwen3") == pytest.approx(0.3)
    assert official_tool_reward(3, 1.0, "qwen3") == 1.0
    assert official_tool_reward(0, 1.0, "qwen3") == 0.0
    assert official_tool_reward(25, 1.0, "linear") == 1.0
    assert official_tool_reward(3, 1.0, "linear", tools_available=False) == 0.0
    assert [official_weight(mode, 50, 100) for mode in ("none", "constant")] == [0.0, 1.0]
    assert official_weight("cosine", 50, 100) == pytest.approx(0.5)
    assert official_weight("cosine", 101, 100) == 0.0


@pytest.mark.parametrize(
    ("variant", "right", "wrong"),
    [("turns", 1.0, -0.8), ("any_tool", 2.0, 0.0), ("any_tool_or_turns", 2.0, -0.8)],
)
def test_retool_turns(variant: str, right: float, wrong: float) -> None:
    assert official_retool_reward(True, 6, variant) == right
    assert official_retool_reward(False, 6, variant) == pytest.approx(wrong)
    assert official_retool_reward(True, 2, variant) == 1.0
    assert official_retool_reward(False, 2, variant) == -1.0
    assert official_retool_reward(False, 200, variant) == 0.0
