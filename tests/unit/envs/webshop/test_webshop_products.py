"""Rows of the official files become products by the official rules."""

import pytest
from webshop_cases import CHAIR, KNOWN, LAMP, ROWS, SHIRT, TEA, row

from megatron_spear.envs.webshop.product import parse_price, parse_products
from megatron_spear.errors import DataError

PRODUCTS = {product.asin: product for product in parse_products(ROWS, KNOWN, "rows")}


@pytest.mark.parametrize(
    ("pricing", "prices"),
    [
        ("$12.99", (12.99,)),
        ("$1,234.50", (1234.5,)),
        ("$5.00 to $7.25", (5.0, 7.25)),
        ("$1 - $2 - $3", (1.0, 2.0)),
        ("", ()),
        (None, ()),
    ],
)
def test_prices(pricing, prices):
    assert parse_price(pricing) == prices


@pytest.mark.parametrize("pricing", ["free", "$ to $5", "$1.2.3"])
def test_a_price_that_is_none(pricing):
    with pytest.raises(DataError, match=r"rows: product 0 cannot be read"):
        parse_products([row("B1", "x", pricing=pricing)], {}, "rows")


def test_price_tags():
    assert [p.price_tag for p in PRODUCTS.values()] == [
        "$24.99",
        "$60.0 to $80.0",
        "$100.0",
        "$995.0",
    ]
    assert PRODUCTS[LAMP].price == 24.99
    assert PRODUCTS[SHIRT].price == 100.0


def test_a_range_has_one_price_inside_it_everywhere():
    price = PRODUCTS[CHAIR].price
    assert 60.0 < price < 80.0
    assert parse_products([ROWS[1]], {}, "rows")[0].price == price
    others = parse_products([row(f"B{i}", "x", pricing="$60 to $80") for i in range(9)], {}, "rows")
    assert len({product.price for product in others}) == 9


def test_options():
    assert PRODUCTS[LAMP].options == {
        "color": ("navy blue", "black | gold"),
        "size": ("small", "large"),
    }
    assert PRODUCTS[CHAIR].options == {}
    assert parse_products([row("B1", "x", customization_options=None)], {}, "r")[0].options == {}


def test_attributes_and_texts():
    assert PRODUCTS[LAMP].attributes == ("easy assembly", "energy saving")
    assert PRODUCTS[TEA].attributes == ("DUMMY_ATTR",)
    assert PRODUCTS[SHIRT].bullets == ("Loose cut",)
    assert PRODUCTS[CHAIR].query == "dining chairs"
    assert parse_products([row("B1", "x")], {}, "r")[0].query == "things"


def test_the_search_document():
    assert PRODUCTS[LAMP].document == (
        "brass desk lamp about the brass desk lamp. first of brass desk lamp "
        "color: navy blue, black | gold, and size: small, large"
    )
    empty = parse_products([row("B1", "X", small_description=[], full_description=None)], {}, "r")
    assert empty[0].document.split() == ["x"]


def test_rows_that_are_passed_over():
    rows = [
        row("nan", "a"),
        row("B0123456789", "b"),
        row("B1", "c"),
        row("B1", "d"),
        row("B2", "e"),
    ]
    assert [p.title for p in parse_products(rows, {}, "rows")] == ["c", "e"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got no products"),
        ([{"asin": "B1"}], "KeyError"),
        (["B1"], "TypeError"),
        ([row("B1", "x", customization_options=["red"])], "AttributeError"),
        ([row("B1", "x", customization_options={"color": [{}]})], "'value'"),
        ([row(7, "x")], "TypeError"),
    ],
)
def test_rows_that_cannot_be_read(rows, message):
    with pytest.raises(DataError, match=message):
        parse_products(rows, {}, "items.json")
