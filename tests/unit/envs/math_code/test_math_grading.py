"""Right is right and wrong is wrong, and no answer hangs, kills or fools the grader."""

import os
import signal
import threading
import time

import pytest

from megatron_spear.envs.math_code import grading
from megatron_spear.envs.math_code.grading import Grader, Verdict, has_math_verify
from megatron_spear.errors import EnvironmentFault

needs_algebra = pytest.mark.skipif(
    not has_math_verify(), reason="math-verify is not installed (extra math)"
)


@pytest.fixture(scope="module")
def grader():
    made = Grader("tolerant", limit_s=1.0)
    yield made
    made.close()


def boxed(answer: str) -> str:
    return f"So the answer is \\boxed{{{answer}}}."


@needs_algebra
@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("204", "204"),
        ("1,200", "1200"),
        ("\\frac{3}{6}", "0.5"),
        ("1 + x", "x+1"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
        ("50\\%", "0.5"),
        ("\\{3, 1, 2\\}", "1,2,3"),
        ("\\text{Tuesday}", "Tuesday"),
    ],
)
def test_right_whatever_the_form(grader, answer, truth):
    assert grader.grade(boxed(answer), truth) == Verdict(True, answer)


@needs_algebra
def test_math_verify_does_not_overrule_units_that_differ(grader):
    assert not grader.grade(boxed("5\\text{ cm}"), "5\\text{ m}").right
    assert not grader.grade(boxed("50\\%"), "50^\\circ").right
    assert grader.grade(boxed("5\\text{ m}"), "5\\text{ metres}").right
    assert grader.grade(boxed("\\frac{1}{3}\\text{ m}"), "\\frac{2}{6}").right
    assert grader.grade(boxed("12 5/8"), "12.625").right
    assert not grader.grade(boxed("12 5/8"), "125/8").right


@needs_algebra
@pytest.mark.parametrize(
    ("answer", "truth"),
    [("205", "204"), ("-204", "204"), ("x", "y"), ("x+2", "x+1"), ("(1,2)", "(2,1)"), ("1", "1/2")],
)
def test_wrong_is_wrong(grader, answer, truth):
    verdict = grader.grade(boxed(answer), truth)
    assert (verdict.right, verdict.answer, verdict.fault) == (False, answer, "")


def test_the_last_complete_box_counts(grader):
    assert grader.grade("\\boxed{1}, no: \\boxed{\\text{\\boxed{2}}} \\boxed{3", "2").right
    assert grader.grade("no answer here", "2") == Verdict(False, None)
    assert grader.grade("\\boxed{}", "2") == Verdict(False, None)


HOSTILE = [
    "9^{9^{9}}",
    "9**9**9",
    "9^{9^{9^{9}}} - 9^{9^{9^{9}}}",
    "(1000000!)!",
    "\\prod_{i=1}^{99999999} i",
    "\\int_0^{1} e^{x^{x^{x}}} dx",
    "\\frac{" * 140,
    "(" * 900,
    "x^{99999} + y^{9999} - (x+y)^{9999}",
    "__import__('os')._exit(0)",
    "\x00\x01",
    "\ud800",
    "\u202e321",
    "1" * 999,
]


@needs_algebra
@pytest.mark.parametrize("answer", HOSTILE)
def test_a_bomb_is_wrong_in_bounded_time(grader, answer):
    began = time.monotonic()
    assert not grader.grade(boxed(answer), "5").right
    assert time.monotonic() - began < 60.0


@needs_algebra
def test_after_a_bomb_the_next_answer_is_graded(grader):
    verdict = grader.grade(boxed("9^{9^{9^{9}}}"), "x + 1")
    # By CPU time, or by the clock where the machine is busy.
    assert not verdict.right
    assert f"status {-signal.SIGPROF}" in verdict.fault or "not graded within" in verdict.fault
    assert grader.grade(boxed("1 + x"), "x + 1").right


def test_a_huge_text_takes_no_time(grader):
    began = time.monotonic()
    for text in ("{" * 1_000_000, "\\boxed{" * 150_000, boxed("7" * 1_000_000), "\\" * 1_000_000):
        assert not grader.grade(text, "7").right
    assert grader.grade("x" * 1_000_000 + boxed("7"), "7").right
    assert time.monotonic() - began < 20.0


@needs_algebra
def test_a_killed_process_costs_one_answer_and_comes_back():
    grader = Grader("tolerant", limit_s=1.0)
    try:
        assert grader.grade(boxed("1 + x"), "x + 1").right
        process = grader._idle.queue[0]
        os.kill(process._child.pid, signal.SIGSTOP)  # hung: neither answers nor uses CPU time
        process._wait_s = 0.3
        assert grader.grade(boxed("2 + x"), "x + 2").fault == "not graded within 0.3 s"
        assert grader.grade(boxed("2 + x"), "x + 2").right
        os.kill(grader._idle.queue[0]._child.pid, signal.SIGKILL)
        grader._idle.queue[0]._child.wait()
        assert grader.grade(boxed("2 + x"), "x + 2").right
    finally:
        grader.close()


@needs_algebra
def test_threads_share_a_grader(grader):
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(grader.grade(boxed(f"{n}+x"), f"x+{n}")))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60.0)
    assert len(found) == 4 and all(verdict.right for verdict in found)


@needs_algebra
def test_processes_end_with_the_grader():
    grader = Grader("tolerant")
    grader.grade(boxed("1 + x"), "x + 1")
    child = grader._idle.queue[0]._child
    grader.close()
    assert child.poll() is not None
    grader.close()


def test_without_math_verify_spelling_and_exact_numbers_decide(monkeypatch):
    monkeypatch.setattr(grading, "has_math_verify", lambda: False)
    grader = Grader("tolerant")
    assert grader.grade(boxed("\\frac{3}{6}"), "0.5").right
    assert not grader.grade(boxed("1 + x"), "x + 1").right


def test_the_official_rule():
    grader = Grader("official_strict")
    assert grader.grade(boxed("204"), "204") == Verdict(True, "204")
    assert not grader.grade(boxed(" 204"), "204").right
    assert not grader.grade(boxed("204") + "x" * 100, "204").right
    assert grader.grade("Answer: 204", "204") == Verdict(False, None)


def test_a_grader_that_cannot_start_is_a_fault(monkeypatch):
    monkeypatch.setattr(grading, "has_math_verify", lambda: True)
    monkeypatch.setattr(grading, "_CHILD", "raise SystemExit('out of luck')")
    with pytest.raises(EnvironmentFault, match=r"did not start.*out of luck"):
        Grader("tolerant").grade(boxed("1 + x"), "x + 1")
