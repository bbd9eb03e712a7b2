"""Every case of the reward: attributes, options, price and the type factor."""

import pytest
from webshop_cases import KNOWN, LAMP, ROWS, goal, row

from megatron_spear.envs.webshop.nouns import noun_finder, word_nouns
from megatron_spear.envs.webshop.product import parse_products
from megatron_spear.envs.webshop.reward import (
    attribute_hits,
    first_colour,
    judge,
    option_hits,
    type_factor,
)
from megatron_spear.errors import ConfigError

PRODUCTS = {product.asin: product for product in parse_products(ROWS, KNOWN, "rows")}


def product(name="Brass Desk Lamp", attributes=(), **changes):
    known = {"B1": {"attributes": list(attributes)}}
    return parse_products([row("B1", name, **changes)], known, "rows")[0]


def score(bought, chosen, **changes):
    return judge(bought, chosen, goal(**changes), word_nouns).score


def test_everything_right_is_one():
    found = judge(PRODUCTS[LAMP], {"color": "navy blue"}, goal(), word_nouns)
    assert found.score == 1.0
    assert found.won
    assert (found.attribute_hits, found.option_hits, found.price_hit) == (1, 1, True)


@pytest.mark.parametrize(
    ("chosen", "changes", "expected"),
    [
        ({}, {}, 2 / 3),  # no option
        ({"color": "black | gold"}, {}, 2 / 3),  # a wrong one
        ({"color": "navy blue"}, {"attributes": ("waterproof",)}, 2 / 3),
        ({"color": "navy blue"}, {"attributes": ("energy saving", "waterproof")}, 3 / 4),
        ({"color": "navy blue"}, {"price_upper": 24.0}, 2 / 3),
        ({"color": "navy blue"}, {"price_upper": 24.99}, 1.0),  # up to the limit
        ({}, {"attributes": ("waterproof",), "price_upper": 10.0}, 0.0),
        ({}, {"options": ()}, 1.0),
        ({"color": "navy blue"}, {"options": ("navy blue", "large")}, 3 / 4),
        ({"color": "navy blue", "size": "large"}, {"options": ("navy blue", "large")}, 1.0),
    ],
)
def test_parts(chosen, changes, expected):
    assert score(PRODUCTS[LAMP], chosen, **changes) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bought", "wanted", "hits"),
    [
        # a fuzzy match with an attribute of the product
        (product(attributes=["essential oil"]), ["essential oils"], 1),
        (product(attributes=["tea tree", "natural ingredients"]), ["tea tree", "oil"], 1),
        (product(attributes=["hand made wood"]), ["wood"], 1),  # words of the other
        (product(attributes=["energy saver"]), ["solid wood"], 0),
        # else a piece of title, bullets or description
        (product("Solid Wood Lamp"), ["solid wood"], 1),
        (product(small_description=["One", "Of Solid WOOD"]), ["solid wood"], 1),
        (product(full_description="Of solid wood."), ["solid wood"], 1),
        (product(small_description=["Of solid", "wood"]), ["solid wood"], 1),  # joined by a space
        (product("Wood, solid"), ["solid wood"], 0),
        # each goal attribute counts once, also where two of the product match
        (product(attributes=["solid wood", "wood solid"]), ["solid wood"], 1),
    ],
)
def test_attributes(bought, wanted, hits):
    assert attribute_hits(bought, wanted) == hits


@pytest.mark.parametrize(
    ("chosen", "wanted", "hits"),
    [
        (["pack of 12", "grey", "XL"], ("grey", "XL", "pack of 12"), 3),
        (["pack of 12", "blue", "XL"], ("grey", "XL", "pack of 12"), 2),
        (["powder snow"], ("cool powder snow",), 1),
        (["blue"], ("navy blue",), 1),  # both are blue
        (["dark navy"], ("navy",), 0),  # dark comes before navy
        (["small"], ("large",), 0),
        ([], ("large",), 0),
        (["large"], (), 0),
        (["x-large"], ("large",), 1),  # all words of the one are in the other
    ],
)
def test_options(chosen, wanted, hits):
    assert option_hits(chosen, goal(options=wanted)) == hits


@pytest.mark.parametrize(
    ("chosen", "wanted", "hits"),
    [
        (["blue"], ("color: blue",), 1),
        (["navy blue"], ("color: blue",), 1),
        (["red"], ("color: dark red",), 1),  # no colour by itself, so compared as words
        (["small"], ("size: large",), 0),
        (["7.5 wide"], ("size: 7.5 wide",), 1),
    ],
)
def test_options_of_synthetic_goals(chosen, wanted, hits):
    assert option_hits(chosen, goal(options=wanted, named=True)) == hits


def test_colours():
    assert first_colour("navy blue") == "blue"
    assert first_colour("infrared") == "red"
    assert first_colour("size 7") == "size 7"


@pytest.mark.parametrize(
    ("title", "wanted", "changes", "factor"),
    [
        # the overlap alone decides: one of three nouns
        ("Brass Door Knob", "Brass Desk Lamp", {}, 1.0),
        # one of five (0.2, not above it), nothing else in common: half
        ("Brass Door Knob", "Brass Desk Lamp Stand Shade", {}, 0.5),
        # the same, but the query or two parts of the path are the same
        ("Brass Door Knob", "Brass Desk Lamp Stand Shade", {"query": "desk lamps"}, 1.0),
        (
            "Brass Door Knob",
            "Brass Desk Lamp Stand Shade",
            {"product_category": "Lighting › x › Home & Garden"},
            1.0,
        ),
        (
            "Brass Door Knob",
            "Brass Desk Lamp Stand Shade",
            {"product_category": "Lighting › Lighting › Door"},
            0.5,
        ),
        # one of eleven: a tenth, whatever else is the same
        (
            "Brass Door Knob",
            "Brass aa bb cc dd ee ff gg hh jj kk",
            {"query": "desk lamps"},
            0.1,
        ),
        # one of ten is not below a tenth
        ("Brass Door Knob", "Brass aa bb cc dd ee ff gg hh jj", {}, 0.5),
        # nothing: nothing, whatever else is the same
        ("Door Knob", "Brass Desk Lamp", {"query": "desk lamps"}, 0.0),
        # a title without nouns counts as 0.2
        ("Door Knob", "12 of 34", {}, 0.5),
        ("Door Knob", "12 of 34", {"query": "desk lamps"}, 1.0),
    ],
)
def test_type_factor(title, wanted, changes, factor):
    bought = product(title, **({"product_category": "Hardware › Knobs"} | changes))
    assert type_factor(bought, goal(name=wanted), word_nouns) == factor


def test_the_type_factor_multiplies():
    bought = product("Brass Door Knob", ["energy saving"], product_category="Hardware")
    wanted = {"name": "Brass Desk Lamp Stand Shade", "options": ()}
    assert score(bought, {}, **wanted) == 0.5
    assert score(bought, {}, **wanted, attributes=("energy saving", "x1")) == pytest.approx(1 / 3)


def test_a_repeated_noun_counts_again_in_what_is_wanted():
    bought = product("Lamp", query="x", product_category="x")
    wanted = goal(name="Lamp shade shade shade shade")
    assert type_factor(bought, wanted, word_nouns) == 0.5


def test_nouns_by_the_word_list():
    assert word_nouns("Fox Soft Leather Wallet, 2 Pack for Men") == [
        "fox",
        "leather",
        "wallet",
        "pack",
        "men",
    ]
    assert noun_finder("words")("Brass Lamp") == ["brass", "lamp"]


def test_spacy_is_asked_for_by_name():
    try:
        import spacy

        spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        with pytest.raises(ConfigError, match="en_core_web_sm"):
            noun_finder("spacy")
    else:
        assert noun_finder("spacy")("Brass Desk Lamp")[-1] == "lamp"
