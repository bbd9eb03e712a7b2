"""Generated shops and goals: fixed by their seeds, in the official schema, and winnable."""

import random

import pytest
from webshop_cases import write_files

from megatron_spear.envs.webshop.generator import (
    generate_goal,
    generate_instruction,
    generate_products,
    generate_rows,
)
from megatron_spear.envs.webshop.nouns import word_nouns
from megatron_spear.envs.webshop.reward import judge
from megatron_spear.envs.webshop.sources import load_human_goals, load_products
from megatron_spear.errors import DataError
from megatron_spear.types import PRODUCT_CATEGORIES

PRODUCTS = generate_products(0, 200)
BY_ASIN = {product.asin: product for product in PRODUCTS}


def goals(count, seed=0, categories=PRODUCT_CATEGORIES, held_out=False):
    return [generate_goal(PRODUCTS, categories, seed, i, held_out=held_out) for i in range(count)]


def test_a_shop_depends_on_its_seed_alone():
    assert generate_rows(0, 60) == generate_rows(0, 60)
    assert generate_rows(0, 60)[0] == generate_rows(0, 80)[0][:60]
    assert generate_rows(0, 60) != generate_rows(1, 60)


def test_a_shop_has_all_kinds():
    assert len(BY_ASIN) == 200
    assert {p.category for p in PRODUCTS} == set(PRODUCT_CATEGORIES)
    assert len({p.query for p in PRODUCTS}) == 20
    tags = [p.price_tag for p in PRODUCTS]
    assert any(" to " in tag for tag in tags)
    assert "$100.0" in tags
    assert all(len(p.options) == 2 and len(p.attributes) == 3 for p in PRODUCTS)


def test_a_generated_shop_goes_through_the_official_files(tmp_path):
    rows, known = generate_rows(0, 200)
    rng = random.Random(0)
    human = {p.asin: [generate_instruction(p, rng)] for p in PRODUCTS}
    paths = write_files(tmp_path, rows, known, human)
    loaded = load_products(paths["products"], paths["attributes"], None)
    assert loaded == PRODUCTS
    assert len(load_human_goals(loaded, paths["instructions"])) == 200


def test_goals_can_be_won_by_their_own_product():
    for goal in goals(100):
        product = BY_ASIN[goal.asin]
        chosen = {
            name: value
            for name, values in product.options.items()
            for value in values
            if value in goal.options
        }
        assert judge(product, chosen, goal, word_nouns).score == 1.0, goal


def test_a_wrong_value_loses():
    lost = 0
    for goal in goals(100):
        product = BY_ASIN[goal.asin]
        wrong = {
            name: next(v for v in values if v not in goal.options)
            for name, values in product.options.items()
        }
        if goal.options:
            assert not judge(product, wrong, goal, word_nouns).won, goal
            lost += 1
    assert lost > 50


def test_goals_depend_on_seed_and_index():
    assert goals(5) == goals(5)
    assert goals(5, seed=1) != goals(5)
    assert len({goal.instruction for goal in goals(200)}) > 150


def test_goals_kept_for_evaluation_are_never_trained_on():
    def asked(goal):
        return goal.asin, tuple(sorted(goal.attributes)), goal.options

    trained = {asked(goal) for goal in goals(600)}
    held_out = {asked(goal) for goal in goals(600, seed=9, held_out=True)}
    assert len(held_out) > 200
    assert not trained & held_out


def test_categories():
    assert {goal.category for goal in goals(30, categories=["grocery"])} == {"grocery"}
    with pytest.raises(DataError, match="no product of toys"):
        goals(1, categories=["toys"])
