"""BM25 against the formula written out, the analyser's words, and the special queries."""

import math
import time
from collections import Counter

import pytest
from webshop_cases import CHAIR, KNOWN, LAMP, ROWS, SHIRT, TEA, row

from megatron_spear.envs.webshop.generator import generate_products
from megatron_spear.envs.webshop.product import parse_products
from megatron_spear.envs.webshop.search import ProductSearch, analyser

PRODUCTS = parse_products(ROWS, KNOWN, "rows")
SEARCH = ProductSearch(PRODUCTS)


def found(text, seed="0"):
    return [PRODUCTS[number].asin for number in SEARCH.find(text, seed)]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The Women's running-shoes", "women run shoe"),
        ("3.5 oz, 1,000 don't", "3.5 oz 1,000 don't"),
        ("dogs’ dog’s", "dog dog"),
        ("to be or not to be", ""),
        ("easily generalized relational", "easili gener relat"),  # Porter's, not Porter 2's
        ("black | gold", "black gold"),
        ("s is us as", "s us"),
        ("Crème brûlée", "crème brûlée"),
        ("...", ""),
        ("", ""),
    ],
)
def test_terms(text, terms):
    assert analyser()(text) == terms.split()


def reference(products, text):
    """(score, number) of each product that matches, by Lucene's formula."""
    analyse = analyser()
    documents = [Counter(analyse(product.document)) for product in products]
    lengths = [sum(document.values()) for document in documents]
    mean = sum(lengths) / len(lengths)
    scores = []
    for number, document in enumerate(documents):
        score = 0.0
        for term in analyse(text):
            holding = sum(term in other for other in documents)
            idf = math.log(1.0 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = document[term]
            score += idf * count / (count + 0.9 * (1 - 0.4 + 0.4 * lengths[number] / mean))
        if score > 0.0:
            scores.append((score, number))
    return sorted(scores, key=lambda entry: (-entry[0], entry[1]))


@pytest.mark.parametrize(
    "text",
    [
        "slim fitting red shirt",
        "gluten free coffee honey honey family",
        "fast charging black headphones for my desk",
        "free",
    ],
)
def test_ranks_as_the_formula_says(text):
    products = generate_products(3, 120)
    ranked = ProductSearch(products).rank(text)
    expected = reference(products, text)
    score_of = {number: score for score, number in expected}
    assert len(ranked) == min(50, len(expected))
    assert [score_of[n] for n in ranked] == pytest.approx(
        [score for score, _ in expected[: len(ranked)]], rel=1e-5
    )


def test_equal_scores_come_in_the_shops_order():
    rows = [row(f"B{number:02}", "same thing") for number in range(70)]
    assert ProductSearch(parse_products(rows, {}, "rows")).rank("thing") == list(range(50))


def test_only_products_that_have_a_word():
    assert found("lamp") == [LAMP]
    assert set(found("chair or tea")) == {CHAIR, TEA}
    assert found("bicycle") == []
    assert found("the of and") == []


@pytest.mark.parametrize("words", ["navy", "brass", "first"])
def test_reads_title_options_and_the_first_bullet(words):
    assert LAMP in found(words)


def test_does_not_read_the_other_bullets_or_the_category():
    assert found("second") == []
    assert found("lighting") == []


def test_special_queries():
    assert found("<a> energy saving") == [LAMP]
    assert found("<a> nothing like it") == []
    assert found("<c> garden") == [LAMP, CHAIR]
    assert found("<c> toys") == []
    assert found("<c>") == []
    assert found("<q> mens shirts") == [SHIRT]
    assert found("<q> mens") == []


def test_random_products():
    products = generate_products(0, 120)
    search = ProductSearch(products)
    first = search.find("<r>", "7/1")
    assert len(set(first)) == 50
    assert search.find("<r> whatever follows", "7/1") == first
    assert search.find("<r>", "7/2") != first
    assert sorted(found("<r>")) == sorted([LAMP, CHAIR, SHIRT, TEA])


def test_special_queries_are_not_cut_off():
    products = generate_products(0, 400)
    assert len(ProductSearch(products).find("<c> garden", "0")) == 80


def test_products_without_a_word():
    rows = [row("B1", "!", full_description="", small_description=["-"])]
    assert ProductSearch(parse_products(rows, {}, "rows")).find("lamp", "0") == []


def test_a_long_query_takes_no_time():
    started = time.perf_counter()
    assert found("lamp " * 800)[0] == LAMP
    assert time.perf_counter() - started < 2.0
