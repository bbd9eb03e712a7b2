"""The program of one grading process: compares answers with math-verify, one after the other.

Started by ``grading`` as ``python -c "...main()" SECONDS BYTES``. It reads one JSON line
``[answer, truth]`` after the other and answers each with ``[right, fault]``, the fault "" unless
math-verify raised. What an answer may cost is bounded by the system, since nothing in Python
interrupts a power tower: more than SECONDS of CPU time ends the process by SIGPROF, memory above
BYTES is a MemoryError.
"""

import json
import logging
import resource
import signal
import sys
from typing import Any

from megatron_spear.errors import describe


def main() -> None:
    """Serve until stdin closes."""
    seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    for name in ("SIGINT", "SIGUSR1"):  # of the parent's process group, and its business alone
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    for limit, most in (("AS", memory_bytes), ("FSIZE", 0), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (most, most))
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    logging.disable(logging.CRITICAL)
    compare = _comparison()
    print("[]", file=replies, flush=True)
    for line in sys.stdin:
        answer, truth = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply: list[Any] = [compare(answer, truth), ""]
        except Exception as error:  # noqa: BLE001 - costs this one answer, reported
            reply = [False, describe(error)[:300]]
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(json.dumps(reply), file=replies, flush=True)


def _comparison() -> Any:
    """``compare(answer, truth)`` of math-verify, its imports and parsers warmed up.

    Its own timeouts are off: they are alarms, which work in main threads alone and stop no C code.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def parsed(answer: str) -> Any:
        return parse(f"\\boxed{{{answer}}}", targets, parsing_timeout=None)

    def compare(answer: str, truth: str) -> bool:
        return bool(verify(parsed(truth), parsed(answer), timeout_seconds=None))

    if not compare("\\frac{1}{2}", "0.5"):
        raise RuntimeError("math-verify says that 1/2 is not 0.5")
    return compare
