"""Goals of the official files: which there are, their price limits, their order."""

import random

import pytest
from webshop_cases import HUMAN, KNOWN, LAMP, ROWS, TEA, goal, row

from megatron_spear.envs.webshop.goal import (
    Goal,
    human_goals,
    price_limit,
    synthetic_goals,
)
from megatron_spear.envs.webshop.product import parse_products
from megatron_spear.errors import DataError

PRODUCTS = parse_products(ROWS, KNOWN, "rows")


def test_human_goals_need_attributes_and_a_product():
    goals = {g.asin: g for g in human_goals(PRODUCTS, HUMAN)}
    assert set(goals) == {LAMP, TEA}
    lamp = goals[LAMP]
    assert lamp.attributes == ("energy saving",)
    assert lamp.options == ("navy blue",)
    assert lamp.price_upper in (40.0, 50.0, 60.0)
    assert lamp.instruction == (
        f"i need an energy saving lamp in blue, and price lower than {lamp.price_upper:.2f} dollars"
    )
    assert (lamp.query, lamp.name, lamp.named) == ("desk lamps", "Brass Desk Lamp", False)


def test_a_product_of_nearly_a_thousand_dollars_has_no_limit():
    tea = next(g for g in human_goals(PRODUCTS, HUMAN) if g.asin == TEA)
    assert tea.price_upper == 1e6
    assert tea.instruction == "i want organic tea"


@pytest.mark.parametrize(
    ("price", "limits"),
    [
        (23.0, {40.0, 50.0, 60.0}),
        (9.99, {20.0, 30.0, 40.0}),
        (10.0, {30.0, 40.0, 50.0}),
        (975.0, {990.0}),
        (980.0, {1e6}),
        (2000.0, {1e6}),
    ],
)
def test_price_limits(price, limits):
    drawn = [price_limit(price, random.Random(seed)) for seed in range(60)]
    assert {limit for limit, _ in drawn} == limits
    for limit, words in drawn:
        assert words == ("" if limit == 1e6 else f", and price lower than {limit:.2f} dollars")


def test_the_official_order():
    rows = [row(f"B{i}", f"thing {i}") for i in range(20)]
    instructions = {
        f"B{i}": [
            {
                "instruction": f"thing {i}",
                "instruction_attributes": ["a"],
                "instruction_options": [],
            }
        ]
        for i in range(20)
    }
    found = [g.asin for g in human_goals(parse_products(rows, {}, "rows"), instructions)]
    expected = [f"B{i}" for i in range(20)]
    random.seed(233)
    random.shuffle(expected)
    assert found == expected


def test_synthetic_goals_are_every_choice_of_options():
    goals = synthetic_goals(PRODUCTS, KNOWN)
    lamps = [g for g in goals if g.asin == LAMP]
    assert len(lamps) == 4
    assert len(goals) == 6
    assert {g.options for g in lamps} == {
        (f"color: {color}", f"size: {size}")
        for color in ("navy blue", "black | gold")
        for size in ("small", "large")
    }
    assert len({g.price_upper for g in lamps}) == 1
    first = next(g for g in lamps if g.options == ("color: navy blue", "size: large"))
    assert first.named
    assert first.attributes == ("energy saving", "easy assembly")
    assert first.instruction == (
        "Find me energy saving desk lamps with color: navy blue, and size: large, and price "
        f"lower than {first.price_upper:.2f} dollars"
    )


def test_a_goal_as_plain_values():
    fields = goal().to_fields()
    assert Goal.from_fields(fields) == goal()
    assert Goal.from_fields(fields | {"options": ["navy blue"]}) == goal()


@pytest.mark.parametrize(
    "changes",
    [{"options": "navy blue"}, {"attributes": [1]}, {"price_upper": "40"}, {"name": None}],
)
def test_fields_of_the_wrong_kind(changes):
    with pytest.raises(DataError, match="wrong kind"):
        Goal.from_fields(goal().to_fields() | changes)


def test_fields_that_are_missing():
    with pytest.raises(DataError, match="expected"):
        Goal.from_fields({"id": "x"})


@pytest.mark.parametrize(
    "instructions",
    [{LAMP: {"a": 1}}, {LAMP: [{"instruction": "x"}]}, {LAMP: ["x"]}],
)
def test_instructions_that_cannot_be_read(instructions):
    with pytest.raises(DataError, match=r"items_human_ins\.json"):
        human_goals(PRODUCTS, instructions)


def test_an_instruction_without_attributes_in_ins_v2():
    known = {LAMP: {"instruction": "Find me lamps", "instruction_attributes": []}}
    with pytest.raises(DataError, match="without instruction_attributes"):
        synthetic_goals(PRODUCTS, known)
