"""Generated problems: their code gives their answer, and held-out ones are never trained on."""

import pytest

from megatron_spear.envs.math_code.arithmetic import (
    ARITHMETIC_KINDS,
    Arithmetic,
    fresh_problem,
    is_held_out,
)
from megatron_spear.errors import DataError


def drawn(seed: int, count: int, **changed) -> list[Arithmetic]:
    settings = {"kinds": ARITHMETIC_KINDS, "largest": 99, "held_out": False, **changed}
    return [fresh_problem(seed, index, **settings) for index in range(count)]


def test_the_code_of_every_kind_gives_the_answer():
    problems = drawn(0, 500)
    assert {problem.kind for problem in problems} == set(ARITHMETIC_KINDS)
    for problem in problems:
        assert eval(problem.expression) == problem.answer, problem


def test_texts_are_plain_sentences():
    texts = {p.kind: p.text for p in drawn(0, 200)}
    starts = {
        "sum": "What is ",
        "product": "What is ",
        "mixed": "What is ",
        "remainder": "What is the remainder of ",
        "range": "What is the sum of all whole numbers from ",
    }
    for kind, start in starts.items():
        assert texts[kind].startswith(start) and texts[kind].endswith("?"), texts[kind]


def test_a_problem_depends_on_seed_and_index_alone():
    assert drawn(3, 20) == drawn(3, 20)
    assert drawn(3, 20) != drawn(4, 20)
    assert len({p.text for p in drawn(0, 300)}) > 290


def test_held_out_problems_are_never_trained_on_whatever_the_seed():
    panel = {p.text for p in drawn(7, 300, largest=12, held_out=True)}
    trained = {p.text for seed in range(3) for p in drawn(seed, 300, largest=12)}
    assert not panel & trained
    assert all(map(is_held_out, panel)) and not any(map(is_held_out, trained))


def test_about_one_in_eight_is_held_out():
    share = sum(is_held_out(f"What is {a} plus {b}?") for a in range(50) for b in range(50)) / 2500
    assert 0.10 < share < 0.15


def test_kinds_are_as_asked_for():
    assert {p.kind for p in drawn(0, 50, kinds=["range", "sum"])} == {"range", "sum"}


def test_too_few_problems_are_an_error():
    held_out = is_held_out("What is 2 times 2?")
    assert drawn(0, 1, kinds=["product"], largest=2, held_out=held_out)
    with pytest.raises(DataError, match="largest=2 leaves no problem"):
        drawn(0, 1, kinds=["product"], largest=2, held_out=not held_out)
