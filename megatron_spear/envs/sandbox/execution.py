"""What running a piece of code gives, and what runs it."""

from dataclasses import dataclass
from typing import Literal, Protocol

Status = Literal["ok", "error", "timeout", "memory", "killed", "unavailable"]
"""``error``: it ended with an exception or another exit status than 0. ``memory``: it wanted more
than it may have. ``killed``: a signal ended it, or it wrote far too much. ``unavailable``: it was
never run (text that is no code at all)."""

MAX_CODE_CHARS = 1_000_000
"""Longer code is not run."""


@dataclass(frozen=True, slots=True)
class Execution:
    """What running a piece of code gave.

    Example: ``print(6*7)`` gives ``Execution("42\\n", "", "ok", 0.004)``, and ``1/0`` the status
    ``error`` with the traceback in ``stderr``.
    """

    stdout: str
    """Its beginning; a last line says so where it is cut."""
    stderr: str
    """Its end."""
    status: Status
    time_s: float


class Sandbox(Protocol):
    """Runs code, each piece for itself: nothing of one is there for the next."""

    def run(self, code: str) -> Execution:
        """Run Python code, any text at all. Never raises for what the code does; EnvironmentFault
        where it could not be run for a reason that is not its own."""
        ...

    def close(self) -> None:
        """End all that belongs to it."""
        ...


def refusal(code: str) -> Execution | None:
    """The answer to text that is not run anywhere: too long, or no Unicode text; else None."""
    if len(code) > MAX_CODE_CHARS:
        why = f"code of {len(code):,} characters; expected at most {MAX_CODE_CHARS:,}"
        return Execution("", why, "unavailable", 0.0)
    try:
        code.encode("utf-8")
    except UnicodeEncodeError as error:
        why = f"the code is no text: lone surrogate at character {error.start}"
        return Execution("", why, "unavailable", 0.0)
    return None


def beginning(output: bytes, total: int, max_chars: int) -> str:
    """The first ``max_chars`` characters of an output of ``total`` bytes, of which ``output`` is
    the beginning; where that is not all, a last line says so."""
    text = output.decode("utf-8", "replace")
    if len(text) <= max_chars and total <= len(output):
        return text
    return f"{text[:max_chars]}\n[cut here: {total:,} bytes in all]"


def end(output: bytes, total: int, max_chars: int) -> str:
    """The same of the end, with the note before it."""
    text = output.decode("utf-8", "replace")
    if len(text) <= max_chars and total <= len(output):
        return text
    return f"[cut here: {total:,} bytes in all]\n{text[len(text) - max_chars :]}"
