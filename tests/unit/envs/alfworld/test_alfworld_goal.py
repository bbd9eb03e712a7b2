"""Compiled goals against a slow readable evaluation, and malformed goals."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.envs.alfworld.goal import compile_goal
from megatron_spear.envs.alfworld.pddl import parse_expression, parse_typed_list
from megatron_spear.errors import DataError

TYPES = {
    "mug1": "object",
    "mug2": "object",
    "pan1": "object",
    "desk1": "receptacle",
    "desk2": "receptacle",
    "mugtype": "otype",
    "me": "agent",
    "here": "location",
}
STATIC = frozenset(
    [
        ("objecttype", "mug1", "mugtype"),
        ("objecttype", "mug2", "mugtype"),
        ("openable", "desk1"),
        ("receptacleatlocation", "desk1", "here"),
    ]
)
POSSIBLE = [
    ("inreceptacle", thing, place)
    for thing in ("mug1", "mug2", "pan1")
    for place in ("desk1", "desk2")
] + [(name, thing) for name in ("isclean", "ishot") for thing in ("mug1", "mug2", "pan1")]

ONE_MUG = (
    "(exists (?o - object ?r - receptacle) (and (objecttype ?o mugtype) (inreceptacle ?o ?r)))"
)
TWO_MUGS = """(exists (?r - receptacle) (exists (?a - object) (and (objecttype ?a mugtype)
    (inreceptacle ?a ?r) (exists (?b - object) (and (not (= ?a ?b)) (objecttype ?b mugtype)
    (inreceptacle ?b ?r))))))"""
FORMULAS = [
    ONE_MUG,
    TWO_MUGS,
    "(and)",
    "(or)",
    "(not (isclean mug1))",
    "(not (not (isclean mug1)))",
    "(and (isclean mug1) (or (ishot mug1) (ishot mug2)) (not (ishot pan1)))",
    "(forall (?o - object) (or (not (objecttype ?o mugtype)) (isclean ?o)))",
    "(forall (?o - object) (imply (objecttype ?o mugtype) (isclean ?o)))",
    "(forall (?r - receptacle) (exists (?o - object) (inreceptacle ?o ?r)))",
    "(exists (?r - receptacle) (forall (?o - object) (not (inreceptacle ?o ?r))))",
    "(exists (?o - object) (or (isclean ?o) (objecttype ?o mugtype)))",
    "(exists (?o - object) (exists (?o - object) (isclean ?o)))",
    "(exists (?o - rtype) (exists (?o - object) (isclean ?o)))",
    "(exists (?r - receptacle ?l - location) (and (openable ?r) (receptacleatlocation ?r ?l)"
    " (inreceptacle mug1 ?r)))",
    "(exists (?a ?b - object) (and (= ?a ?b) (isclean ?a) (ishot ?b)))",
    "(exists (?x - rtype) (isclean mug1))",
]


def evaluate(formula, facts, names):
    """The textbook definition: try every object for every variable."""
    head = formula[0]
    if head == "and":
        return all(evaluate(part, facts, names) for part in formula[1:])
    if head == "or":
        return any(evaluate(part, facts, names) for part in formula[1:])
    if head == "not":
        return not evaluate(formula[1], facts, names)
    if head == "imply":
        return not evaluate(formula[1], facts, names) or evaluate(formula[2], facts, names)
    if head in ("exists", "forall"):
        variables = parse_typed_list(formula[1], "x")
        ranges = [[o for o, t in TYPES.items() if kind in (t, "object")] for _, kind in variables]
        tries = (
            evaluate(
                formula[2], facts, names | dict(zip([v for v, _ in variables], chosen, strict=True))
            )
            for chosen in itertools.product(*ranges)
        )
        return any(tries) if head == "exists" else all(tries)
    words = [names.get(word, word) for word in formula[1:]]
    return words[0] == words[1] if head == "=" else (head, *words) in facts


@pytest.mark.parametrize("text", FORMULAS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(facts=st.sets(st.sampled_from(POSSIBLE)))
def test_compiled_goal_equals_the_definition(text, facts):
    formula = parse_expression(text, "x")
    check = compile_goal(formula, TYPES, STATIC, "x")
    assert check(facts) is evaluate(formula, facts | STATIC, {})


def test_two_mugs_need_two_mugs_in_one_desk():
    check = compile_goal(parse_expression(TWO_MUGS, "x"), TYPES, STATIC, "x")
    first = ("inreceptacle", "mug1", "desk1")
    assert not check({first})
    assert not check({first, ("inreceptacle", "mug2", "desk2")})
    assert not check({first, ("inreceptacle", "pan1", "desk1")})
    assert check({first, ("inreceptacle", "mug2", "desk1")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(isshiny mug1)", "expected a predicate"),
        ("(checked mug1)", "expected a predicate"),
        ("(isclean mug9)", "'mug9' is no object"),
        ("(isclean ?o)", "no bound variable"),
        ("(isclean mug1 mug2)", "expected 1 names"),
        ("(isclean (mug1))", "is no object"),
        ("(exists (?o - furniture) (isclean ?o))", "no object has the type 'furniture'"),
        ("(exists (?o - object))", "expected \\(exists"),
        ("(exists ?o (isclean ?o))", "expected \\(exists"),
        ("(not (isclean mug1) (isclean mug2))", "expected a predicate"),
        ("(and isclean)", "expected \\(and"),
        ("(())", "expected \\(and"),
        ("()", "expected \\(and"),
    ],
)
def test_malformed_goal_is_an_error_that_names_the_game(text, message):
    with pytest.raises(DataError, match=message) as error:
        compile_goal(parse_expression(text, "x"), TYPES, STATIC, "game 7")
    assert "game 7" in str(error.value)


def test_too_large_a_goal_is_an_error():
    types = {f"thing{number}": "object" for number in range(250)}
    formula = parse_expression("(exists (?a ?b - object) (not (= ?a ?b)))", "x")
    with pytest.raises(DataError, match="ground formulas"):
        compile_goal(
            ["not", ["exists", formula[1], ["inreceptacle", "?a", "?b"]]], types, set(), "x"
        )


def test_a_check_over_many_things():
    types = {f"o{n}": "object" for n in range(150)} | {f"r{n}": "receptacle" for n in range(40)}
    types |= {"mugtype": "otype"}
    static = {("objecttype", f"o{n}", "mugtype") for n in range(4)}
    check = compile_goal(parse_expression(TWO_MUGS, "x"), types, static, "x")
    facts = {("inreceptacle", f"o{n}", f"r{n % 40}") for n in range(150)}
    assert not check(facts)
    assert check(facts | {("inreceptacle", "o0", "r1")})
