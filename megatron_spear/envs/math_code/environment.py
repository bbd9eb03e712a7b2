"""Math problems with a code interpreter: calls of the tool, then a final answer that is graded."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_spear.envs.math_code.bench import Bench, leave_bench, take_bench
from megatron_spear.envs.math_code.grading import GraderName
from megatron_spear.envs.math_code.interpreter import output_text, unfenced
from megatron_spear.envs.protocol import StepResult
from megatron_spear.envs.tools.environment import Outcome, ToolEnvironment
from megatron_spear.envs.tools.texts import middle_left_out
from megatron_spear.envs.tools.tool import Tool, ToolFailure
from megatron_spear.errors import DataError
from megatron_spear.rewards.graders import extract_answer

_ANCHOR_CHARS = 2000


class MathCodeEnvironment(ToolEnvironment):
    """One math problem; reward 1.0 for the right final answer, else 0.0.

    Options of `reset`:
        problem: its text, which is the first observation.
        answer: the known answer.

    An answer with calls runs them and goes on; one without is the final answer and ends the
    attempt, as in the released code. It is valid if it has an answer: a complete ``\\boxed{}`` or
    an ``Answer:`` line. Neither a call nor an answer is a void turn: lost, and nothing is learned
    from it (``algorithm.row_filters.void``). An empty text or thoughts alone get another try, void
    too.

    ``info`` holds what `ToolEnvironment` says, ``anchor`` (the problem and all outputs so far:
    equal anchors have read the same), and after the final answer ``answer`` (as read) and
    ``grading_fault`` (why it could not be graded, "" where it could).
    """

    def __init__(
        self,
        *,
        sandbox: Mapping[str, Any],
        grader: GraderName = "tolerant",
        grader_limit_s: float = 5.0,
        prelude: str = "",
        max_calls_per_turn: int = 1,
        max_output_chars: int = 8000,
        stderr_lines: int = 10,
        make_bench: Callable[..., Bench] = take_bench,
    ) -> None:
        """See `config.environments.math_code`; ``make_bench`` is another one's where no model
        writes the code."""
        self.max_reply_chars = max_output_chars
        self._bench_settings = (dict(sandbox), grader, grader_limit_s)
        self._make_bench = make_bench
        self._bench: Bench | None = None
        self._prelude = prelude.rstrip() + "\n" if prelude.strip() else ""
        self._max_calls, self._stderr_lines = max_calls_per_turn, stderr_lines
        self._calls_this_turn = 0
        self._problem, self._truth = "", ""
        self._read: list[str] = []
        self._graded: dict[str, Any] = {}

    def start(self, seed: int, options: Mapping[str, Any]) -> str:
        """The problem; ``seed`` changes nothing."""
        for name in ("problem", "answer"):
            value = options.get(name)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"options[{name!r}] is {value!r}; expected a text")
        if self._bench is None:
            self._bench = self._make_bench(*self._bench_settings)
        self._problem, self._truth = options["problem"], options["answer"]
        self._read, self._graded = [], {}
        return self._problem

    def step(self, action: str) -> StepResult:
        """Run the calls of an answer, or grade it."""
        self._calls_this_turn = 0
        result = super().step(action)
        self._read += result.info["replies"] or filter(None, [result.observation])
        result.info.update(self.state())
        return result

    def code_interpreter(self, code: str) -> str:
        """Run one program in the sandbox."""
        assert self._bench is not None, "a call comes after reset"
        self._calls_this_turn += 1
        if self._calls_this_turn > self._max_calls:
            most = f"{self._max_calls} call" + ("s" if self._max_calls > 1 else "")
            raise ToolFailure(f"error: only {most} can be made in one answer")
        ran = self._bench.sandbox.run(self._prelude + unfenced(code))
        return output_text(ran, self._stderr_lines)

    tools = (
        Tool(
            "code_interpreter",
            "Runs a Python program and returns what it prints.",
            {
                "type": "object",
                "properties": {
                    "code": {
                        "type": "string",
                        "description": "The whole program. Print every result you need.",
                    }
                },
                "required": ["code"],
            },
            code_interpreter,
        ),
    )

    def finish(self, content: str) -> Outcome:
        """Grade a final answer."""
        assert self._bench is not None, "an answer comes after reset"
        verdict = self._bench.grader.grade(content, self._truth)
        answer = extract_answer(content)
        self._graded = {"answer": (answer or "")[:200], "grading_fault": verdict.fault}
        return Outcome(float(verdict.right), won=verdict.right, valid=answer is not None)

    def state(self) -> dict[str, Any]:
        """The anchor, and how the answer was graded."""
        read = "\n".join([self._problem, *self._read])
        return {"anchor": middle_left_out(read, _ANCHOR_CHARS), **self._graded}

    def close(self) -> None:
        """Leave the sandbox and the grader to the others."""
        if self._bench is not None:
            leave_bench(self._bench)
            self._bench = None
