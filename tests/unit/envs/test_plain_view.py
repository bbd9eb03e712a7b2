"""The plain view: messages, tags, thoughts, windows."""

import pytest

from megatron_spear.envs.plain_view import PlainView

PLAIN, TAGGED = PlainView(), PlainView(tag="answer", instruction="Answer in tags.")


def _text(messages):
    ((message),) = messages
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.parametrize(
    ("text", "action", "valid", "void"),
    [
        ("go left", "go left", True, False),
        ("  go left\n", "go left", True, False),
        ("<think>hm</think> go left", "go left", True, False),
        ("<think>hm</think> ", "", False, True),
        ("", "", False, True),
        ("</think>", "", False, True),
        ("<think>go left", "", False, True),
    ],
)
def test_the_whole_answer_is_the_action(text, action, valid, void):
    assert tuple(PLAIN.parse(text)) == (action, valid)
    assert PLAIN.void(text) is void


@pytest.mark.parametrize(
    ("text", "action", "valid", "void"),
    [
        ("<answer>4</answer>", "4", True, False),
        ("so <answer>3</answer>, no, <answer> 4 </answer>.", "4", True, False),
        ("<think><answer>3</answer></think> nothing", "", False, True),
        ("<think>say <answer>3</answer>, no", "", False, True),
        ("<answer></answer>", "", False, False),
        ("<answer>4", "", False, True),
        ("4", "", False, True),
    ],
)
def test_the_action_stands_in_its_tag(text, action, valid, void):
    assert tuple(TAGGED.parse(text)) == (action, valid)
    assert TAGGED.void(text) is void


def test_a_demonstrated_action_is_read_again():
    assert PLAIN.demonstrate("4") == "4" and TAGGED.demonstrate("4") == "<answer>4</answer>"
    for view in (PLAIN, TAGGED):
        assert tuple(view.parse(view.demonstrate("go to 4"))) == ("go to 4", True)


def test_the_instruction_comes_once():
    assert _text(TAGGED.full("2 + 2?", {}, 0)) == "2 + 2?\nAnswer in tags."
    assert _text(TAGGED.full("No.", {}, 1)) == "No."
    assert _text(PLAIN.full("2 + 2?", {}, 0)) == "2 + 2?"


def test_windows_say_everything_once():
    steps = [("first", "a"), ("second", "b"), ("third", "c")]
    assert _text(PLAIN.window("first", [], "first", {}, 0)) == "first"
    assert _text(PLAIN.window("first", steps[:1], "second", {}, 1)) == "first\na\nsecond"
    whole = _text(PLAIN.window("first", steps, "fourth", {}, 3))
    assert whole == "first\na\nsecond\nb\nthird\nc\nfourth"
    last = _text(TAGGED.window("first", steps[1:], "fourth", {}, 3))
    assert last == "first\nAnswer in tags.\nsecond\nb\nthird\nc\nfourth"
