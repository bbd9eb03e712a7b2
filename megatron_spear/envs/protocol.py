"""The protocol every text environment follows (Gymnasium's five-tuple, text in and text out)."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class StepResult(NamedTuple):
    """What one action led to.

    ``info`` carries plain picklable values: ``admissible`` (list of str), ``won`` (bool), ``valid``
    (was the action understood and possible), ``anchor`` (state text for step-level grouping),
    ``tool_calls`` (what the action called, in order, each a dict of the fields of
    `types.ToolCall`: ``{"name": "python", "arguments": "print(1)", "succeeded": True}``; a game
    reports the action itself). Calls with equal names and arguments count as the same one.
    """

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class TextEnvironment(Protocol):
    """One task instance that answers text with text.

    ``reset`` may be called again on the same object with other options. An action the environment
    cannot read is answered with an observation and ``info["valid"] = False``; it is never an
    exception.
    """

    def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Start the task described by ``options`` (``Prompt.metadata``); returns (observation,
        info)."""
        ...

    def step(self, action: str) -> StepResult:
        """Apply one action text."""
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...
