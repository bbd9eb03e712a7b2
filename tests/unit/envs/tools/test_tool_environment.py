"""Calls run in order, each with a reply; what a model does wrong is told it and counted."""

import json
import time

import pytest

from megatron_spear.envs.tools.environment import Outcome, ToolEnvironment
from megatron_spear.envs.tools.texts import middle_left_out
from megatron_spear.envs.tools.tool import Tool, ToolFailure
from megatron_spear.errors import EngineError, EnvironmentFault


def _schema(*required, **properties):
    return {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in properties.items()},
        "required": list(required),
    }


class _Bench(ToolEnvironment):
    max_reply_chars = 100

    def start(self, seed, options):
        self.ran = []
        return "work"

    def finish(self, content):
        return Outcome(reward=2.0, won=content == "done", observation="bye")

    def state(self):
        return {"anchor": f"{len(self.ran)} ran"}

    def note(self, text, times=1):
        self.ran.append(text)
        if text == "fail":
            raise ToolFailure("it did not work")
        if text == "fault":
            raise EngineError("the sandbox is gone")
        if text == "stop":
            self.outcome = Outcome(reward=1.0, won=True)
        if text == "surrogate":
            return "\ud800"
        return {"number": 7, "crash": None}.get(text, text * times) if text != "crash" else 1 // 0

    tools = (
        Tool("note", "Says it.", _schema("text", text="string", times="integer"), note),
        Tool("rest", "Nothing.", _schema(), lambda self: ""),
    )


def _call(tool, /, **arguments):
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


@pytest.fixture
def bench():
    environment = _Bench()
    assert environment.reset(seed=0, options={}) == (
        "work",
        {"won": False, "valid": True, "anchor": "0 ran"},
    )
    return environment


def test_calls_run_in_order_each_with_a_reply(bench):
    result = bench.step(f"<think>two</think>{_call('note', text='a')}{_call('note', text='b')}")
    assert bench.ran == ["a", "b"] and result.observation == "a\nb"
    assert result.info["replies"] == ["a", "b"] and result.info["valid"]
    assert result.info["tool_calls"] == [
        {"name": "note", "arguments": f'{{"text": "{text}"}}', "succeeded": True} for text in "ab"
    ]
    assert result.info["anchor"] == "2 ran"
    assert not result.terminated and result.reward == 0.0


@pytest.mark.parametrize(
    ("text", "reply", "valid"),
    [
        (_call("nota", text="x"), 'error: there is no tool "nota"; there are: note, rest', False),
        (_call("note"), 'error: note: missing argument "text"', False),
        (_call("note", text="x", tims=3), 'error: note: unknown argument "tims"', False),
        (_call("note", text=3), 'error: note: argument "text" must be of type string', False),
        (_call("rest", self=1), 'error: rest: unknown argument "self"', False),
        ("<tool_call>note</tool_call>", "error: not valid JSON", False),
        (_call("note", text="fail"), "it did not work", True),
        (_call("note", text="crash"), "error: note: ZeroDivisionError", True),
    ],
)
def test_a_call_that_does_not_work_is_told_and_counted(bench, text, reply, valid):
    result = bench.step(text + _call("note", text="next"))
    assert result.info["replies"][0].startswith(reply)
    assert [call["succeeded"] for call in result.info["tool_calls"]] == [False, True]
    assert result.info["valid"] is valid and not result.terminated
    assert bench.ran[-1] == "next", "the calls after it run all the same"


def test_a_fault_that_says_nothing_about_the_policy_comes_out(bench):
    with pytest.raises(EngineError):
        bench.step(_call("note", text="fault"))


def test_an_answer_without_calls_is_the_final_one(bench):
    result = bench.step("<think>ok</think> done ")
    assert result[:4] == ("bye", 2.0, True, False) and result.info["won"]
    assert result.info["tool_calls"] == [] == result.info["replies"]
    with pytest.raises(EnvironmentFault, match="outside a task"):
        bench.step("again")
    bench.reset(seed=1, options={})
    assert not bench.step(_call("rest")).terminated


@pytest.mark.parametrize("text", ["", " \n", "<think>for ever", "<think></think>"])
def test_neither_a_call_nor_an_answer(bench, text):
    result = bench.step(text)
    assert result.observation == "That was neither a tool call nor an answer."
    assert not result.terminated and not result.info["valid"]


def test_a_tool_may_end_the_task(bench):
    result = bench.step(_call("note", text="stop") + _call("note", text="late"))
    assert result.terminated and result.info["won"] and result.reward == 1.0
    assert result.info["replies"] == ["stop", "error: the task has ended"]
    assert bench.ran == ["stop"]


def test_replies_are_bounded_clean_texts(bench):
    calls = [_call("note", text="xy", times=100_000), _call("note", text="surrogate")]
    calls += [_call("note", text="number"), _call("n" * 100_000)]
    replies = bench.step("".join(calls)).info["replies"]
    assert [len(reply) <= 150 for reply in replies] == [True] * 4
    assert replies[0].startswith("xyxy") and "[199900 characters left out]" in replies[0]
    assert replies[1:3] == ["?", "7"]
    assert middle_left_out("abcdef", 4) == "ab\n[2 characters left out]\nef"


def test_a_megabyte_of_text_is_answered_soon(bench):
    started = time.process_time()
    for text in (_call("note", text="x" * 1_000_000), "<tool_call>" * 90_000, "word " * 200_000):
        bench.step(text)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("kind", "fits", "fails"),
    [
        ("string", ["", "a"], [1, None, [], True]),
        ("integer", [1, -(10**30), 2.0], [True, "1", 1.5, float("inf")]),
        ("number", [1, 1.5], [True, "1", None]),
        ("boolean", [True], [1, "true"]),
        ("array", [[], [1]], [{}, "[]"]),
        ("object", [{}], [[], None]),
        ("null", [None], [0, False]),
        (["string", "null"], ["a", None], [1]),
    ],
)
def test_arguments_are_held_to_their_types(kind, fits, fails):
    tool = Tool("f", "", _schema(x=kind), lambda self, x: "")
    assert [tool.problem({"x": value}) for value in fits] == [None] * len(fits)
    assert all("must be of type" in (tool.problem({"x": value}) or "") for value in fails)


def test_an_argument_is_one_of_an_enum():
    parameters = {"properties": {"x": {"enum": ["a", 1]}}, "required": ["y"]}
    tool = Tool("f", "", parameters, lambda self, x: "")
    assert tool.problem({"x": [], "z": 0}) == (
        'missing argument "y"; unknown argument "z"; argument "x" must be one of \'a\', 1'
    )


def test_the_schema_is_in_openai_form():
    assert _Bench.tools[0].schema() == {
        "type": "function",
        "function": {
            "name": "note",
            "description": "Says it.",
            "parameters": _schema("text", text="string", times="integer"),
        },
    }
