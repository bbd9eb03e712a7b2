"""Is a final answer right? Graded in processes of their own, whatever the answer is.

math-verify hands a model's text to a computer algebra system, which a power tower can keep busy for
days. So each grading process has limits on CPU time and memory, and the one who asks waits a
bounded time; a process that is lost is made anew. An answer that cannot be graded is wrong:
nobody may earn by crashing the grader. Only processes that do not even start are a fault.
"""

import contextlib
import importlib.util
import json
import queue
import select
import subprocess
import sys
import threading
import time
from typing import Any, Literal, NamedTuple

from megatron_spear.errors import EnvironmentFault
from megatron_spear.rewards.answers import as_number, cleaned, equivalent
from megatron_spear.rewards.graders import extract_answer, official_strict

GraderName = Literal["tolerant", "official_strict"]

MAX_ANSWER_CHARS = 1000
"""Longer answers are wrong: no answer of a data set has a tenth of it."""
_MEMORY_BYTES = 2 << 30
_START_S = 120.0
CLOCK_FACTOR = 6.0
"""CPU time is what is limited; on a busy machine it may take this much longer by the clock."""
_CHILD = "from megatron_spear.envs.math_code.grader_child import main; main()"


class Verdict(NamedTuple):
    """Whether an answer is right, the answer as read from the text (None: none was found), and why
    it could not be graded ("" where it could)."""

    right: bool
    answer: str | None
    fault: str = ""


def has_math_verify() -> bool:
    """Whether math-verify is installed (extra ``math``)."""
    return importlib.util.find_spec("math_verify") is not None


class Grader:
    """Grades final answers; ``close`` ends its processes.

    - ``tolerant``: the last ``\\boxed{}`` (else the last ``Answer:`` line) of the whole text has
      the truth's value: by exact arithmetic and spelling (`rewards.answers`), else by math-verify.
      Without math-verify the former decides alone, and ``x + 1`` is not ``1 + x``.
    - ``official_strict``: the released code's rule, by spelling alone.

    ``limit_s`` is CPU time for one answer; by the clock it takes at most six times as long, and the
    start of a process when one was lost. Threads may share a grader; each of ``processes`` grades
    one answer at a time.

    Example: ``Grader("tolerant").grade("So it is \\\\boxed{\\\\frac{3}{6}}.", "0.5")`` is
    ``Verdict(True, "\\\\frac{3}{6}")``.
    """

    def __init__(self, name: GraderName, *, limit_s: float = 5.0, processes: int = 1) -> None:
        self._name = name
        self._limit_s = limit_s
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)
        self._processes = processes
        self._uses_algebra = name == "tolerant" and has_math_verify()

    def grade(self, text: str, truth: str) -> Verdict:
        """The verdict on a text. Raises EnvironmentFault where no grading process starts."""
        if self._name == "official_strict":
            graded = official_strict(text, truth)
            return Verdict(graded.score > 0, graded.answer)
        answer = extract_answer(text)
        if answer is None:
            return Verdict(False, None)
        if len(answer) > MAX_ANSWER_CHARS:
            return Verdict(False, answer, f"longer than {MAX_ANSWER_CHARS} characters")
        if equivalent(answer, truth):
            return Verdict(True, answer)
        if not self._uses_algebra or _told_apart(answer, truth):
            return Verdict(False, answer)
        right, fault = self._compare(answer, truth)
        return Verdict(right, answer, fault)

    def close(self) -> None:
        """End the grading processes; one that grades at the moment ends when it has."""
        for _ in range(self._processes):
            with contextlib.suppress(queue.Empty):
                process = self._idle.get(timeout=self._limit_s * CLOCK_FACTOR + _START_S)
                if process is not None:
                    process.end()
        for _ in range(self._processes):
            self._idle.put(None)

    def _compare(self, answer: str, truth: str) -> tuple[bool, str]:
        """math-verify's verdict and why there is none."""
        process = self._idle.get()
        try:
            if process is None or not process.alive:
                process = _Process(self._limit_s)
            return process.compare(answer, truth)
        finally:
            self._idle.put(process)


def _told_apart(answer: str, truth: str) -> bool:
    """Whether exact arithmetic has the last word on two answers that it does not call the same.

    It has on plain whole numbers, and on numbers of different units, which math-verify drops.
    """
    numbers = [as_number(cleaned(text)) for text in (answer, truth)]
    known = [number for number in numbers if number is not None]
    if len(known) < 2:
        return False
    units = {unit for _, unit in known}
    whole = all(value.denominator == 1 for value, _ in known)
    return (whole and units == {""}) or (len(units) == 2 and "" not in units)


class _Process:
    """One grading process. It ends when its stdin closes, so also with this process."""

    def __init__(self, limit_s: float) -> None:
        self._wait_s = limit_s * CLOCK_FACTOR
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(limit_s), str(_MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._errors = bytearray()
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        if self._reply(_START_S) is None:
            self.end()
            said = self._errors.decode(errors="replace").strip()[-500:] or "nothing"
            raise EnvironmentFault(
                f"a grading process did not start within {_START_S:g} s (exit status "
                f"{self._child.returncode}); it said: {said}"
            )

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._child.poll() is None

    def compare(self, answer: str, truth: str) -> tuple[bool, str]:
        """Its verdict; a process that is late or gone says wrong, and is ended."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps([answer, truth]).encode() + b"\n")
            self._child.stdin.flush()
            reply = self._reply(self._wait_s)
        except OSError:
            reply = None
        if reply is None:
            late = self._child.poll() is None
            self.end()
            if late:
                return False, f"not graded within {self._wait_s:g} s"
            return False, f"the grading process ended with status {self._child.returncode}"
        right, fault = reply
        return bool(right), str(fault)

    def end(self) -> None:
        """Kill it and wait for its end."""
        self._child.kill()
        self._child.wait()
        self._reader.join(timeout=1.0)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _reply(self, wait_s: float) -> Any | None:
        """Its next line, or None when it is late, gone or out of its mind."""
        assert self._child.stdout is not None
        file, line, ends = self._child.stdout.fileno(), b"", time.monotonic() + wait_s
        while not line.endswith(b"\n"):
            left_s = ends - time.monotonic()
            if left_s <= 0 or not select.select([file], [], [], left_s)[0]:
                return None
            data = self._child.stdout.read1(4096)  # type: ignore[attr-defined]
            if not data:
                self._child.wait(timeout=_START_S)
                return None
            line += data
        try:
            return json.loads(line)
        except ValueError:
            return None

    def _read_errors(self) -> None:
        """Keep the last of what it says on stderr, so that it never waits for a reader."""
        assert self._child.stderr is not None
        with self._child.stderr as stream:
            while data := stream.read1(4096):  # type: ignore[attr-defined]
                self._errors = (self._errors + data)[-4000:]
