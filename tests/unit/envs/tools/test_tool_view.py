"""Replies as messages of role tool, windows of past answers, and what counts as void."""

import pytest

from megatron_spear.envs.tools.view import ToolView
from megatron_spear.testing.market_environment import MarketEnvironment, MarketView

CALL = '<tool_call>{"name": "price", "arguments": {"item": "fig"}}</tool_call>'
VIEW = ToolView(MarketEnvironment.tools)


def _said(role, content):
    return {"role": role, "content": content}


def test_the_tools_are_listed():
    assert [tool["function"]["name"] for tool in VIEW.tools] == ["price", "multiply"]


def test_a_reply_for_each_call():
    view = ToolView(MarketEnvironment.tools, system="Be brief.")
    assert view.full("task", {}, 0) == (_said("system", "Be brief."), _said("user", "task"))
    info = {"replies": ["59", ""]}
    assert view.full("59\n", info, 1) == (_said("tool", "59"), _said("tool", ""))
    assert view.full("go on", {"replies": []}, 1) == (_said("user", "go on"),)


def test_a_window_shows_the_last_answers_without_their_thoughts():
    history = [("task", f"<think>hm</think>{CALL}"), ("59", "fifty"), ("no", f"{CALL}")]
    info = {"replies": ["59"]}
    assert VIEW.window("task", history, "59", info, 3) == (
        _said("user", "task"),
        _said("assistant", CALL),
        _said("tool", "59"),
        _said("assistant", "fifty"),
        _said("user", "no"),
        _said("assistant", CALL),
        _said("tool", "59"),
    )
    task, *others = VIEW.window("task", history[2:], "59", info, 3)
    assert task["content"].startswith("task\n") and task["content"].endswith("no")
    assert "[2 earlier turns" in task["content"]
    assert others == [_said("assistant", CALL), _said("tool", "59")]
    assert VIEW.window("task", [], "task", {}, 0) == (_said("user", "task"),)


@pytest.mark.parametrize(
    ("text", "valid", "void", "answers"),
    [
        (CALL, True, False, True),
        (f"<think>a</think>{CALL}{CALL}", True, False, True),
        (f"{CALL}<tool_call>x</tool_call>", False, False, True),
        ("<tool_call>x</tool_call>", False, True, True),
        (f"<think>{CALL}", False, True, True),
        ("", False, True, True),
        ("<think>a</think>\n", False, True, True),
        ("it costs 3", True, False, False),
        ("<think>a</think> 42", True, False, True),
    ],
)
def test_form(text, valid, void, answers):
    assert VIEW.parse(text) == (text, valid) and VIEW.void(text) is void
    # A view whose answers have a form of their own.
    assert MarketView().parse(text).valid is (valid and answers)
    assert MarketView().void(text) is (void or not answers)
    assert VIEW.demonstrate(text) == text
