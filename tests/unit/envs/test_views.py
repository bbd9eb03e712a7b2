"""ALFWorld's two prompt styles: what they show, and what counts as a well-formed answer."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.envs.alfworld.prompts import alfworld_view, task_of
from megatron_spear.envs.views import last_between, user_message, void_action

FIRST = (
    "You are in the middle of a room. Looking quickly around you, you see a desk 1, and a shelf 1."
    "\n\nYour task is to: put some mug on desk."
)
STEPS = [
    (FIRST, "go to desk 1"),
    ("You arrive at desk 1. On the desk 1, you see nothing.", "go to shelf 1"),
    ("You arrive at shelf 1. On the shelf 1, you see a mug 2.", "take mug 2 from shelf 1"),
]
NOW = "You pick up the mug 2 from the shelf 1."
INFO = {"admissible": ["go to desk 1", "help", "inventory", "look"]}


def test_compact_shows_the_observation_as_it_is():
    view = alfworld_view("compact")
    assert not view.needs_admissible
    assert view.full(FIRST, {}, 0) == (user_message(FIRST),)
    assert view.window(FIRST, [], FIRST, {}, 0) == (user_message(FIRST),)
    assert view.full(NOW, {}, 3) == ({"role": "user", "content": NOW},)


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_compact_window_shows_each_text_once(window):
    (message,) = alfworld_view("compact").window(FIRST, STEPS[-window:], NOW, {}, 3)
    text = message["content"]
    shown = STEPS[-window:]
    lines = [FIRST]
    for seen, action in shown:
        lines += [action] if seen == FIRST else [seen, action]
    assert text == "\n".join([*lines, NOW])
    assert text.count("Your task is to:") == 1


def test_compact_parses_the_whole_answer():
    parse = alfworld_view("compact").parse
    assert parse(" look\n") == ("look", True)
    assert parse(" ") == ("", False)


@pytest.mark.parametrize("turn", [0, 3])
def test_official_window_has_task_steps_observation_and_possible_actions(turn):
    view = alfworld_view("official")
    assert view.needs_admissible
    history = STEPS[-2:] if turn else []
    (message,) = view.window(FIRST, history, NOW if turn else FIRST, INFO, turn)
    text = message["content"]
    assert "put some mug on desk." in text
    for tag in ("<think>", "</think>", "<action>", "</action>"):
        assert tag in text
    assert "'go to desk 1', 'inventory', 'look'" in text
    assert "help" not in text
    if turn:
        assert "Actions taken so far: 3." in text and "step 4" in text
        assert "[2] you saw" in text and "[3] you saw" in text and "[1]" not in text
        assert text.count("take mug 2 from shelf 1") == 1
        assert NOW in text and FIRST not in text


def test_official_full_repeats_the_possible_actions_not_the_task():
    (message,) = alfworld_view("official").full(NOW, INFO, 3)
    text = message["content"]
    assert NOW in text and "'look'" in text and "put some mug" not in text and "<action>" in text


@pytest.mark.parametrize(
    ("text", "action", "valid"),
    [
        ("<think>a</think><action>Look</action>", "look", True),
        ("<think>a</think><action> go to\n Desk 1 </action> done", "go to desk 1", True),
        ("<action>a</action><think>x</think><action>b</action><action>c", "b", True),
        ("<think>x</think><action>a<action>look</action>", "look", True),
        ("<think></think><action></action>", "", True),
        ("<action>look</action>", "look", False),
        ("<think>never closed <action>look</action>", "look", False),
        ("<think>a</think> look", "", False),
        ("<think>a</think></action><action>", "", False),
        ("<think>开门</think><action>look</action>", "look", False),
        ("", "", False),
    ],
)
def test_official_parse(text, action, valid):
    assert alfworld_view("official").parse(text) == (action, valid)


@pytest.mark.parametrize(
    ("text", "void"),
    [
        ("<think>a</think><action>go</action>", False),
        ("<action>\ngo\n</action>", False),
        ("<think>a</think><think>b</think> <action></action>", False),
        ("<think><action>go</action></think>", True),
        ("</action>go<action>", True),
        ("<action>go", True),
        ("", True),
    ],
)
def test_official_void(text, void):
    assert void_action(text) is alfworld_view("official").void(text) is void


@pytest.mark.parametrize(("text", "void"), [("look", False), (" \n", True), ("", True)])
def test_compact_void_is_an_empty_answer(text, void):
    assert alfworld_view("compact").void(text) is void


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(alphabet=st.characters(exclude_characters="<>")), st.text())
def test_last_between_finds_the_last_pair(before, inside, after):
    text = f"{before}<action>{inside}</action>{after.replace('</action>', '')}"
    assert last_between(text, "<action>", "</action>") == inside


@pytest.mark.parametrize("style", ["compact", "official"])
def test_a_demonstration_parses_to_its_action(style):
    view = alfworld_view(style)
    text = view.demonstrate("go to desk 1")
    assert view.parse(text) == ("go to desk 1", True) and not view.void(text)


def test_task_of():
    assert task_of(FIRST) == "put some mug on desk."
    assert task_of("no mark here ") == "no mark here"


def test_void_takes_time_linear_in_the_text():
    started = time.thread_time()
    assert void_action("<action>" * 125_000) and not void_action("<action></action>" * 60_000)
    assert time.thread_time() - started < 1.0
