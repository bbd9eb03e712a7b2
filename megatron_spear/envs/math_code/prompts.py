"""The two prompt styles of math with code: ``compact`` for tiny models, ``official`` as published.

Both speak of the same tool, called in the same form (Hermes and Qwen)::

    <tool_call>
    {"name": "code_interpreter", "arguments": {"code": "print(37 * 58)"}}
    </tool_call>
"""

import json
from typing import Literal

from megatron_spear.envs.math_code.environment import MathCodeEnvironment
from megatron_spear.envs.tools.view import ToolView
from megatron_spear.rewards.graders import extract_answer

SYSTEM = (
    "You solve math problems. You can call a Python interpreter: use it for calculations and to "
    "check your reasoning, and print every value that you need. Each call is a program of its "
    "own: nothing is kept from one to the next. Think step by step; when you are sure, write the "
    "final answer, once and without any further call, inside \\boxed{}."
)
"""In our own words; the chat template adds the tool and the form of its calls."""


class MathView(ToolView):
    """The problem, then what each call printed.

    A turn is void when it has neither a call that can be read nor a final answer, which is a
    complete ``\\boxed{}`` or an ``Answer:`` line.
    """

    def answers(self, content: str) -> bool:
        """Whether a text without calls has a final answer."""
        return extract_answer(content) is not None


def math_view(style: Literal["compact", "official"]) -> MathView:
    """The view of ``env.prompt``: ``compact`` shows neither instructions nor the tool's schema."""
    if style == "compact":
        return MathView(())
    return MathView(MathCodeEnvironment.tools, SYSTEM)


def call_text(code: str) -> str:
    """The answer that calls the interpreter."""
    call = {"name": "code_interpreter", "arguments": {"code": code}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def answer_text(answer: str | int) -> str:
    """The final answer."""
    return f"\\boxed{{{answer}}}"
