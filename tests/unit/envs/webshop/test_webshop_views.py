"""WebShop's two prompt styles: pages without the instruction, actions in brackets or tags."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.envs.views import user_message
from megatron_spear.envs.webshop.prompts import webshop_view, without_instruction

TASK = "i need a red shirt, and price lower than 40.00 dollars"
INFO = {"task": TASK, "admissible": ["click[back to search]", "click[next >]", "click[b01]"]}
FIRST = f"WebShop [SEP] Instruction: [SEP] {TASK} [SEP] Search"
RESULTS = (
    f"Instruction: [SEP] {TASK} [SEP] Back to Search [SEP] Page 1 (Total results: 1) [SEP] Next > "
    "[SEP] B01 [SEP] Red shirt [SEP] $20.0"
)
ITEM = f"Instruction: [SEP] {TASK} [SEP] Back to Search [SEP] < Prev [SEP] Red shirt"
STEPS = [(FIRST, "search[red shirt]"), (RESULTS, "click[b01]"), (ITEM, "click[< prev]")]


def content(messages):
    (message,) = messages
    assert message["role"] == "user"
    return message["content"]


def test_pages_without_the_instruction():
    assert without_instruction(ITEM, INFO) == "Back to Search [SEP] < Prev [SEP] Red shirt"
    assert without_instruction(FIRST, INFO) == "WebShop [SEP] Search"
    rich = f"You have clicked red.\nInstruction:\n{TASK}\n[button] Back to Search [button_]\n"
    assert without_instruction(rich, INFO) == (
        "You have clicked red.\n[button] Back to Search [button_]\n"
    )
    assert without_instruction("Thank you", INFO) == "Thank you"
    assert without_instruction(ITEM, {}) == ITEM


def test_compact_shows_the_instruction_once():
    view = webshop_view("compact")
    assert not view.needs_admissible
    assert view.full(FIRST, INFO, 0) == (user_message(FIRST),)
    assert TASK not in content(view.full(RESULTS, INFO, 1))
    text = content(view.window(FIRST, STEPS[-2:], RESULTS, INFO, 3))
    assert text.split("\n") == [
        FIRST,
        without_instruction(RESULTS, INFO),
        "click[b01]",
        without_instruction(ITEM, INFO),
        "click[< prev]",
        without_instruction(RESULTS, INFO),
    ]
    early = content(view.window(FIRST, STEPS[:1], RESULTS, INFO, 1))
    assert early.split("\n") == [FIRST, "search[red shirt]", without_instruction(RESULTS, INFO)]


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("search[ red shirt ]", "search[red shirt]"),
        (" click[buy now]\n", "click[buy now]"),
        ("click[ a]b ]", "click[a]b]"),
        ("click[ < prev ] x", "click[< prev] x"),
        ("search[", "search["),
        ("buy it", "buy it"),
        ("]", "]"),
    ],
)
def test_compact_reads_actions(text, action):
    assert webshop_view("compact").parse(text) == (action, True)
    assert webshop_view("compact").parse(" ") == ("", False)


def test_official_opens_with_task_page_and_actions():
    view = webshop_view("official")
    assert view.needs_admissible
    text = content(view.full(FIRST, INFO, 0))
    assert f"Your task is to: {TASK}\nYou now see: 'WebShop' [SEP] 'Search'" in text
    assert "'click[back to search]', 'click[next >]', 'click[b01]'" in text
    for tag in ("<think>", "</think>", "<action>", "</action>"):
        assert tag in text


def test_official_window():
    text = content(webshop_view("official").window(FIRST, STEPS[-2:], RESULTS, INFO, 3))
    assert text.count(TASK) == 1
    assert "Actions taken so far: 3. The most recent 2:" in text
    assert "[2] you saw: 'Back to Search' [SEP] 'Page 1 (Total results: 1)'" in text
    assert "    you did: click[b01]" in text
    assert "You are at step 4 and now see: 'Back to Search'" in text


def test_official_later_turns_of_a_full_conversation():
    text = content(webshop_view("official").full(ITEM, INFO, 2))
    assert text.startswith("After action 2: 'Back to Search' [SEP] '< Prev' [SEP] 'Red shirt'")
    assert TASK not in text


def test_official_shows_rich_pages_as_they_are():
    rich = f"Instruction:\n{TASK}\n[button] Back to Search [button_]\n"
    text = content(webshop_view("official").full(rich, INFO, 1))
    assert text.startswith("After action 1: [button] Back to Search [button_]\n")


@pytest.mark.parametrize("style", ["compact", "official"])
@pytest.mark.parametrize("action", ["search[red shirt]", "click[b01]", "click[7.5 | wide]"])
def test_demonstrated_answers_are_read_back(style, action):
    view = webshop_view(style)
    text = view.demonstrate(action)
    assert view.parse(text) == (action, True)
    assert not view.void(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(categories=["L", "P", "Z", "C", "S"]), max_size=60))
def test_any_text_is_read(text):
    for style in ("compact", "official"):
        action, _ = webshop_view(style).parse(text)
        assert isinstance(action, str)
