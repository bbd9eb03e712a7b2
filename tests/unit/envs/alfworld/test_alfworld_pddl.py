"""Reading PDDL: good text, and one clear error for each way it can be broken."""

import pytest

from megatron_spear.envs.alfworld.pddl import (
    parse_expression,
    parse_problem,
    parse_typed_list,
    show_expression,
)
from megatron_spear.errors import DataError


def test_expression_is_lower_case_nested_lists_without_comments():
    text = "(Define (A b) ; a comment with (\n  (C (D)))"
    assert parse_expression(text, "x") == ["define", ["a", "b"], ["c", ["d"]]]


def test_shown_expression_reads_back_the_same():
    expression = ["and", ["not", ["=", "?a", "?b"]], ["p", "?a"]]
    assert parse_expression(show_expression(expression), "x") == expression


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(a (b)", "1 '\\(' left open"),
        ("(a))", "closes nothing"),
        ("", "0 top-level items"),
        ("(a) (b)", "2 top-level items"),
        ("word", "1 top-level items"),
        ("(" * 200 + ")" * 200, "nest deeper"),
    ],
)
def test_unbalanced_or_stray_text_is_an_error(text, message):
    with pytest.raises(DataError, match=message) as error:
        parse_expression(text, "game 7")
    assert "game 7" in str(error.value)


def test_typed_list():
    assert parse_typed_list(["a", "b", "-", "t", "c", "-", "u", "d"], "x") == [
        ("a", "t"),
        ("b", "t"),
        ("c", "u"),
        ("d", "object"),
    ]


@pytest.mark.parametrize("items", [["a", "-"], ["-", "t"], [["a"], "-", "t"]])
def test_malformed_typed_list_is_an_error(items):
    with pytest.raises(DataError):
        parse_typed_list(items, "x")


def test_problem_of_the_small_game(problem):
    read = parse_problem(problem, "small")
    assert read.types["mug_bar_1"] == "object"
    assert read.types["loc_bar_3"] == "location"
    assert ("inreceptacle", "mug_bar_1", "countertop_bar_1") in read.init
    assert all(atom[0] != "=" for atom in read.init)
    assert read.goal[0] == "and"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(:goal", "(:gaol", "no goal"),
        ("(:objects", "(:things", "no objects"),
        ("(:init", "(:start", "no init"),
        ("(define", "(undefine", "expected \\(define"),
        ("(problem small_kitchen)", "(name small_kitchen)", "expected \\(define"),
        ("(openable Drawer_bar_1)", "(openable Drawer_bar_9)", "openable drawer_bar_9"),
        ("(openable Drawer_bar_1)", "(not (openable Drawer_bar_1))", "expected a predicate"),
        ("(openable Drawer_bar_1)", "openable", "'openable' in \\(:init"),
        ("    (and\n        (exists", "    (and) (and\n        (exists", "holds 2 formulas"),
    ],
)
def test_broken_problem_is_an_error_that_names_the_game(problem, old, new, message):
    assert old in problem
    with pytest.raises(DataError, match=message) as error:
        parse_problem(problem.replace(old, new, 1), "game 7")
    assert "game 7" in str(error.value)


def test_truncated_problem_is_an_error(problem):
    with pytest.raises(DataError, match="unbalanced"):
        parse_problem(problem[: len(problem) // 2], "small")
