"""One attempt at a problem: programs run and are answered, the final answer is graded."""

import json
import time

import pytest

from megatron_spear.envs.math_code import bench
from megatron_spear.envs.math_code.bench import Bench
from megatron_spear.envs.math_code.demonstrations import demonstration_environment
from megatron_spear.envs.math_code.environment import MathCodeEnvironment
from megatron_spear.envs.math_code.grading import Grader
from megatron_spear.envs.math_code.interpreter import NO_OUTPUT, output_text, unfenced
from megatron_spear.envs.math_code.prompts import answer_text, call_text, math_view
from megatron_spear.envs.sandbox.execution import Execution
from megatron_spear.envs.tools.tool import ToolFailure
from megatron_spear.errors import DataError, EnvironmentFault
from megatron_spear.testing.environments import check_environment

OPTIONS = {"problem": "What is 37 times 58?", "answer": "2146"}


def ran(stdout="", stderr="", status="ok"):
    return Execution(stdout, stderr, status, 0.0)


class _Scripted:
    """A sandbox that keeps the programs it was given and answers with what was scripted."""

    def __init__(self, *answers):
        self.programs, self._answers = [], list(answers)
        self.closed = False

    def run(self, code):
        self.programs.append(code)
        answer = self._answers.pop(0) if self._answers else ran("7\n")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        self.closed = True


def started(sandbox=None, **options):
    sandbox = sandbox or _Scripted()
    environment = MathCodeEnvironment(
        sandbox={}, make_bench=lambda *_: Bench(sandbox, Grader("tolerant")), **options
    )
    observation, info = environment.reset(seed=0, options=OPTIONS)
    assert observation == OPTIONS["problem"] and info["anchor"] == observation
    return environment


def test_it_keeps_the_contract():
    actions = [call_text("print(37 * 58)"), call_text("37 * 58"), answer_text(2146)]
    check_environment(
        lambda: demonstration_environment(stderr_lines=1), options=OPTIONS, actions=actions
    )


def test_a_program_then_the_answer():
    environment = demonstration_environment()
    environment.reset(seed=0, options=OPTIONS)
    result = environment.step("<think>compute</think>" + call_text("print(37 * 58)"))
    assert result[:4] == ("2146", 0.0, False, False) and result.info["replies"] == ["2146"]
    assert result.info["tool_calls"] == [
        {
            "name": "code_interpreter",
            "arguments": json.dumps({"code": "print(37 * 58)"}),
            "succeeded": True,
        }
    ]
    assert result.info["anchor"] == "What is 37 times 58?\n2146"
    last = environment.step("It is \\boxed{2146}.")
    assert (last.reward, last.terminated) == (1.0, True)
    assert last.info["won"] and last.info["valid"] and last.info["answer"] == "2146"


def test_a_wrong_answer_is_valid_and_lost():
    last = started().step("\\boxed{2145}")
    assert (last.reward, last.terminated, last.info["valid"]) == (0.0, True, True)
    assert not last.info["won"] and last.info["grading_fault"] == ""


@pytest.mark.parametrize("text", ["I do not know.", "\\boxed{}", "\\boxed{2146", "go on"])
def test_neither_a_call_nor_an_answer_is_a_void_turn(text):
    last = started().step(text)
    assert last.terminated and not last.info["won"] and not last.info["valid"]
    for style in ("compact", "official"):
        view = math_view(style)
        assert view.void(text) and not view.parse(text).valid
        assert not view.void("\\boxed{1}") and not view.void("Answer: 3")
        assert not view.void(call_text("x")) and view.void("<tool_call>{</tool_call>")


def test_thoughts_alone_are_void_and_get_another_try():
    environment = started()
    result = environment.step("<think>hm")
    assert not result.terminated and not result.info["valid"]
    assert math_view("compact").void("<think>hm")
    assert environment.step("<think>now</think>\\boxed{2146}").info["won"]


def test_an_answer_within_a_thought_does_not_count():
    assert not started().step("<think>\\boxed{2146}</think> so").info["won"]


def test_a_failing_program_is_told_and_no_invalid_turn():
    trace = "Traceback (most recent call last):\n  File x\nZeroDivisionError: division by zero\n"
    environment = started(_Scripted(ran("1\n", trace, "error")), stderr_lines=1)
    result = environment.step(call_text("print(1)\n1/0"))
    assert result.observation == "1\nZeroDivisionError: division by zero"
    assert result.info["valid"] and not result.info["tool_calls"][0]["succeeded"]


@pytest.mark.parametrize(
    ("execution", "text"),
    [
        (ran("", "a\nb\nc\n", "error"), "b\nc"),
        (ran("", "", "error"), "error: the program ended with another exit status than 0"),
        (ran("1\n", "", "timeout"), "1\nerror: the program took too long and was stopped"),
        (ran("", "MemoryError\n", "memory"), "MemoryError"),
        (ran("", "", "memory"), "error: the program wanted more memory than it may have"),
    ],
)
def test_what_is_told_of_a_failure(execution, text):
    with pytest.raises(ToolFailure) as raised:
        output_text(execution, 2)
    assert str(raised.value).startswith(text)


def test_a_program_that_prints_nothing_is_told_so():
    assert output_text(ran(" \n"), 2) == NO_OUTPUT
    assert output_text(ran("a\n\n", "a warning"), 2) == "a"


@pytest.mark.parametrize(
    ("code", "inside"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("Here:\n```py\nfor i in x:\n    y\n```\nDone", "for i in x:\n    y"),
        ("```\nprint('```')\n```", "print('```')"),
        ("```python\nprint(1)", "print(1)"),
        ("x = '`'", "x = '`'"),
    ],
)
def test_fenced_code_is_unwrapped(code, inside):
    assert unfenced(code) == inside


def test_the_prelude_comes_first():
    sandbox = _Scripted()
    started(sandbox, prelude="import math\n").step(call_text("```python\nprint(math.pi)\n```"))
    assert sandbox.programs == ["import math\nprint(math.pi)"]


def test_calls_beyond_the_limit_are_refused():
    sandbox = _Scripted()
    environment = started(sandbox, max_calls_per_turn=2)
    for _ in range(2):
        result = environment.step(call_text("print(7)") * 3)
        assert result.info["replies"][:2] == ["7", "7"]
        assert result.info["replies"][2] == "error: only 2 calls can be made in one answer"
        assert [call["succeeded"] for call in result.info["tool_calls"]] == [True, True, False]
    assert len(sandbox.programs) == 4


def test_long_output_is_shortened():
    environment = started(_Scripted(ran("x" * 5000)), max_output_chars=100)
    reply = environment.step(call_text("print('x' * 5000)")).observation
    assert len(reply) < 150 and "left out" in reply


def test_the_anchor_is_what_was_read():
    sandbox = _Scripted(ran("1"), ran("2"), ran("1"), ran("2"))
    anchors = []
    for code in ("print(1)", "print(3 - 2)"):
        environment = started(sandbox)
        environment.step(call_text(code))
        anchors.append(environment.step(call_text("print(2)")).info["anchor"])
    assert anchors[0] == anchors[1] == "What is 37 times 58?\n1\n2"


def test_a_dead_sandbox_is_a_fault_and_no_reward():
    environment = started(_Scripted(EnvironmentFault("the sandbox died")))
    with pytest.raises(EnvironmentFault, match="the sandbox died"):
        environment.step(call_text("print(1)"))


@pytest.mark.parametrize("options", [{}, {"problem": "p"}, {"problem": 3, "answer": "1"}])
def test_options_that_are_no_problem(options):
    with pytest.raises(DataError, match="expected a text"):
        demonstration_environment().reset(seed=0, options=options)


def test_hostile_answers_take_bounded_time():
    began = time.monotonic()
    for text in ("\\boxed{" * 100_000, "x" * 1_000_000, "\u202e\x00\ud800", "<tool_call>" * 50_000):
        result = started().step(text)
        assert not result.info["valid"] and not result.info["won"]
    for code in ("\x00", "\ud800", "```" * 100_000, "`" * 300_000, "```\n" * 50_000):
        result = started(_Scripted(ran("\x00"))).step(call_text(code))
        assert result.observation == "\x00"
    assert time.monotonic() - began < 20.0


def test_environments_of_one_process_share_a_bench(monkeypatch):
    made = []

    def make_sandbox(options):
        made.append(_Scripted())
        return made[-1]

    monkeypatch.setattr(bench, "make_sandbox", make_sandbox)
    first, second, other = (MathCodeEnvironment(sandbox={"time_s": number}) for number in (1, 1, 2))
    for environment in (first, second, other):
        environment.reset(seed=0, options=OPTIONS)
        environment.reset(seed=0, options=OPTIONS)
    assert len(made) == 2
    first.close()
    first.close()
    assert not made[0].closed
    second.close()
    assert made[0].closed and not made[1].closed
    other.close()
    assert made[1].closed and not bench._BENCHES
    first.reset(seed=0, options=OPTIONS)
    assert len(made) == 3
    first.close()
