"""What is read in a generated text: thoughts, calls and their faults, content."""

import json
import time

import pytest

from megatron_spear.envs.tools.parsing import MAX_CALLS, parse_answer


def _call(name="price", **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_thought_calls_and_content_come_apart():
    calls = f"{_call(item='pear')}\n{_call('multiply', a=2, b=3)}"
    text = f"<think>\nthe price\n</think>\n\nI ask.\n{calls}"
    thought, calls, content = parse_answer(text)
    assert (thought, content) == ("the price", "I ask.")
    assert [(c.name, dict(c.arguments), c.error) for c in calls] == [
        ("price", {"item": "pear"}, None),
        ("multiply", {"a": 2, "b": 3}, None),
    ]
    assert calls[0].text == '{"item": "pear"}'


@pytest.mark.parametrize(
    ("text", "thought", "content", "num_calls"),
    [
        ("", "", "", 0),
        ("42", "", "42", 0),
        (f"<think>{_call()}</think>42", _call(), "42", 0),
        (f"{_call()}</think>42", _call(), "42", 0),  # the template opened the thought
        (f"<think>on and on {_call()}", f"on and on {_call()}", "", 0),
        (f"<think>a</think>x<think>b</think>{_call()}", "a</think>x<think>b", "", 1),
        (f"a <think>b{_call()}", f"b{_call()}", "a", 0),
        (f"{_call()}tail", "", "tail", 1),
        ("<tool_call>", "", "", 1),
    ],
)
def test_where_thoughts_end(text, thought, content, num_calls):
    parsed = parse_answer(text)
    assert (parsed.thought, parsed.content, len(parsed.calls)) == (thought, content, num_calls)


@pytest.mark.parametrize(
    ("inside", "error"),
    [
        ('{"name": "price", "arguments": {"item": "pear"}', "not valid JSON"),
        ("{'name': 'price'}", "not valid JSON"),
        ('{"name": "f", "arguments": {"code": "a\nb"}}', "Invalid control character"),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN is no JSON number"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "a list"),
        ('"price"', "a string"),
        ("null", "null"),
        ('{"arguments": {}}', '"name" must'),
        ('{"name": 3, "arguments": {}}', '"name" must'),
        ('{"name": "", "arguments": {}}', '"name" must'),
        ('{"name": "f", "arguments": [1]}', '"arguments" is a list'),
        ('{"name": "f", "arguments": null}', '"arguments" is null'),
        ('{"name": "f", "arguments": 7}', '"arguments" is a number'),
        ('{"name": "f", "arguments": "print(1)"}', '"arguments" is a string'),
        ('{"name": "f", "arguments": "[1]"}', '"arguments" is a list'),
        ('{"name": "f", "arguments": {"x": ' + "[" * 40 + "]" * 40 + "}}", "nested deeper"),
        ("[" * 100_000, "nested deeper"),
        ('{"name": "f"} and more', "nothing but one JSON object"),
        ('{"name": "f"}{"name": "g"}', "nothing but one JSON object"),
    ],
)
def test_a_faulty_call_says_what_is_wrong(inside, error):
    _, (call, after), content = parse_answer(f"<tool_call>{inside}</tool_call>x{_call()}")
    assert call.error is not None and error in call.error and not call.arguments
    assert len(call.error) < 200 and len(call.text) <= 1000
    assert (after.name, after.error, content) == ("price", None, "x")


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ('<tool_call>{"name": "f"}', ["no </tool_call>"]),
        (f'<tool_call>{{"name": "f"}}{_call()}', ["no </tool_call>", None]),
        (f"<tool_call>{_call()}", ["no </tool_call>", None]),
        (f"<tool_call>{_call()}</tool_call>", ["no </tool_call>", None, "no <tool_call>"]),
        ('{"name": "f"}</tool_call>', ["no <tool_call>"]),
        ("<tool_call>" * 3, ["no </tool_call>"] * 3),
    ],
)
def test_tags_that_do_not_pair(text, errors):
    calls = parse_answer(text).calls
    assert len(calls) == len(errors)
    for call, error in zip(calls, errors, strict=True):
        assert (call.error is None) if error is None else (error in call.error)


def test_tags_in_strings_do_not_end_a_call():
    code = "print('</tool_call><tool_call><think>')"
    (call,) = parse_answer(_call("python", code=code)).calls
    assert call.error is None and call.arguments == {"code": code}


def test_other_ways_to_write_a_call():
    inner = json.dumps({"code": "print(1)"})
    written = json.dumps({"name": "python", "arguments": inner})
    (call,) = parse_answer(f"<tool_call>{written}</tool_call>").calls
    assert call.arguments == {"code": "print(1)"} and call.error is None
    (call,) = parse_answer('<tool_call>{"name": "look"}</tool_call>').calls
    assert (call.name, dict(call.arguments), call.text) == ("look", {}, "{}")
    bare = '<think>hm</think> {"name": "look", "parameters": {"x": 1}}'
    (call,) = parse_answer(bare).calls
    assert (call.name, dict(call.arguments)) == ("look", {"x": 1})
    for answer in ('{"name": "Ann"}', '{"name": "a", "parameters": 3}', '{"name": 1}', "{}"):
        assert parse_answer(answer) == ("", (), answer)


def test_lone_surrogates_do_not_leave_the_parser():
    text = '<tool_call>{"name": "f\\ud800", "arguments": {"x": "\\udfff"}}</tool_call>'
    (call,) = parse_answer(text).calls
    assert call.name == "f?" and call.text == '{"x": "?"}'
    (call,) = parse_answer("<tool_call>\ud800</tool_call>").calls
    assert call.text == "?"


def test_calls_beyond_the_limit_are_one_fault():
    calls = parse_answer(_call() * (MAX_CALLS + 50)).calls
    assert len(calls) == MAX_CALLS + 1 and "only 32 calls" in calls[-1].error
    assert all(call.error is None for call in calls[:-1])


@pytest.mark.parametrize(
    "piece",
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", '<tool_call>{"a":"', "<", '{"', "[",
        '<tool_call>{"name":"f","arguments":{"x":"', "\\", "<tool_call>{}", "a</think>", " \n",
        '<tool_call>[""', "\x00", "\ud800", '<tool_call>"',
    ],
)  # fmt: skip
def test_time_is_linear_in_the_text(piece):
    def seconds(size):
        text = (piece * (size // len(piece) + 1))[:size]
        started = time.process_time()
        parse_answer(text)
        return time.process_time() - started

    assert seconds(1_000_000) < 1.0
