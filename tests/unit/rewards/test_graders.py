"""Where the final answer is found, and what the tolerant and the official graders make of it."""

import random
import time

import pytest

from megatron_spear.rewards.graders import (
    extract_answer,
    grade,
    official_minerva,
    official_strict,
)
from megatron_spear.rewards.minerva import minerva_normal_form


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{41}, no: \\boxed{ 42 }", "42"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed {7} and \\fbox{8}", "8"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("the set { and \\boxed{3}", "3"),
        ("} } \\boxed{3} }", "3"),
        ("\\boxed{41} then \\boxed{42", "41"),
        ("\\boxed{1 + \\boxed{2}}", "2"),
        ("\\boxed{5} \\boxed{ }", "5"),
        ("Answer: 12\n", "12"),
        ("**Final Answer**: the value is $\\frac{1}{2}$ metres", "\\frac{1}{2}"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("Answer: 1, or \\boxed{2}", "2"),
        ("The final answer is 9", "9"),
        ("no answer here 42", None),
        ("\\boxed{42", None),
        ("\\boxed 42", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["\\boxed{41}", "42", "", "\\boxed{42, 41}", "\\boxed{42} \\boxed{1}"]
)
def test_the_default_grader_gives_zero_for_wrong_or_missing(text: str) -> None:
    assert grade(text, "42").score == 0.0


def test_official_strict_by_hand() -> None:
    assert official_strict("\\boxed{42}", "42") == (1.0, "42")
    assert official_strict("\\boxed{42}" + "." * 90, "42") == (1.0, "42")
    assert official_strict("\\boxed{42}" + "." * 91, "42") == (-1.0, None)
    assert official_strict("\\boxed{42} \\boxed{4", "42") == (-1.0, None)


def test_official_minerva_by_hand() -> None:
    assert official_minerva("Answer: x = 1,000 dollars", "1000") == (1.0, "1000")
    assert official_minerva("Answer: 42" + "\n" * 300, "42") == (-1.0, "[INVALID]")


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("\\frac12", "\\frac{1}{2}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("$\\text{east}$", "east"),
        ("90^\\circ", "90"),
        ("a 12 inches", "12"),
        ("1,2", "12"),
        ("(1,2)", "(1,2)"),
        ("\\left(1,2\\right)", "\\left(1,2\\right)"),
        ("10 ft", "10ft"),
        ("10 feet", "10"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{42} and \\boxed{41}", "42}and\\boxed{41"),
        ("\\textbf{\\overline{AB}}", "AB"),
        ("\\text{{a}b}", "{ab}"),
        ("cost $4$ or $2$", "4"),
        ("$\\sqrt$", "\\sqrt{}"),
        ("$\\frac1$", "\\frac{1}{}"),
        ("x\n$4$ y", "x\n4"),
        ("42 dollars \\text{ m}", "42"),
    ],
)
def test_minerva_normal_form(answer: str, normal: str) -> None:
    assert minerva_normal_form(answer) == normal


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "{", "\\boxed{}", "answer:", "answer: ", "Final Answer **", "$", "\\"]
)
def test_time_is_linear_in_hostile_text(piece: str) -> None:
    start = time.process_time()
    grade(piece * (200_000 // len(piece)), "42")
    assert time.process_time() - start < 2.0


def test_random_text_is_never_an_error() -> None:
    pieces = [*"}{12,.()$^/", "\\boxed{", "\\frac", "\\text{"]
    draw = random.Random(0)
    found = 0
    for _ in range(2000):
        text = "\\boxed{" + "".join(draw.choices(pieces, k=draw.randrange(12))) + "}"
        graded = grade(text, "1/2")
        found += graded.answer is not None
        assert graded.score in (0.0, 1.0)
    assert found > 500
