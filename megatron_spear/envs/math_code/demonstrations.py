"""Worked problems for the warm start: call the interpreter, read its output, give the answer.

Slips are what a young policy gets wrong about the tool: nothing printed, a program that does not
run, JSON that does not parse. Each is answered by the environment itself and followed by the right
call.
"""

import contextlib
import io
import random
import traceback
from collections.abc import Callable
from typing import Any

from megatron_spear.envs.demonstration import Demonstration, DemonstrationTurn
from megatron_spear.envs.math_code.arithmetic import Arithmetic
from megatron_spear.envs.math_code.bench import Bench
from megatron_spear.envs.math_code.environment import MathCodeEnvironment
from megatron_spear.envs.math_code.grading import Grader
from megatron_spear.envs.math_code.prompts import answer_text, call_text
from megatron_spear.envs.sandbox.execution import Execution

MAX_SLIPS = 2  # most slips in a row


def demonstrate(
    problem: Arithmetic,
    rng: random.Random,
    environment: MathCodeEnvironment,
    *,
    noise: float,
    max_turns: int,
    guesses: float = 0.0,
) -> Demonstration:
    """Solve ``problem``: slips (each with chance ``noise``), a call, the final answer; or, with
    chance ``guesses``, a wrong final answer at once.

    ``environment`` is one of `demonstration_environment`. Needs ``max_turns`` >= 2; there are fewer
    slips where turns are few.
    """
    guessed = rng.random() < guesses
    if guessed:
        actions = [(answer_text(_guess(problem.answer, rng)), True)]
    else:
        actions = _solution(problem, rng, noise, min(MAX_SLIPS, max_turns - 2))
    options = {"problem": problem.text, "answer": str(problem.answer)}
    observation, info = environment.reset(seed=0, options=options)
    turns = []
    for action, trained in actions:
        shown = {"replies": info["replies"]} if "replies" in info else {}
        turns.append(DemonstrationTurn(observation, action, trained, shown))
        observation, _, _, _, info = environment.step(action)
    assert info["won"] is not guessed, f"{problem}: the demonstrated answer is wrong"
    return Demonstration(tuple(turns))


def _solution(
    problem: Arithmetic, rng: random.Random, noise: float, max_slips: int
) -> list[tuple[str, bool]]:
    """(answer, is it one to learn) of every turn."""
    slips: list[str] = []
    while len(slips) < max_slips and rng.random() < noise:
        slips.append(rng.choice(SLIPS)(problem.expression))
    return [
        *((slip, False) for slip in slips),
        (call_text(f"print({problem.expression})"), True),
        (answer_text(problem.answer), True),
    ]


def _guess(answer: int, rng: random.Random) -> int:
    """A wrong answer of one digit."""
    return rng.choice([number for number in range(10) if number != answer])


SLIPS: tuple[Callable[[str], str], ...] = (
    lambda expression: call_text(expression),
    lambda expression: call_text(f"print({expression}"),
    lambda expression: call_text(f"prin({expression})"),
    lambda expression: call_text(f"print({expression})").replace("}}\n", "}\n"),
)
"""From a problem's expression to an answer that does not work."""


def demonstration_environment(**options: Any) -> MathCodeEnvironment:
    """An environment without a sandbox, which runs programs in this process: never a model's."""
    return MathCodeEnvironment(sandbox={}, make_bench=_own_bench, **options)


def _own_bench(*_: Any) -> Bench:
    return Bench(_OwnCode(), Grader("tolerant"))


class _OwnCode:
    """Runs programs that this module has written itself."""

    def run(self, code: str) -> Execution:
        """Run a program."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except Exception as error:  # noqa: BLE001 - a slip's, shown as an interpreter shows it
            told = "".join(traceback.format_exception_only(error))
            return Execution(printed.getvalue(), told, "error", 0.0)
        return Execution(printed.getvalue(), "", "ok", 0.0)

    def close(self) -> None:
        """Nothing is held."""
