"""The shop's search: BM25 as Lucene ranks, over stemmed words, and four special queries."""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import bm25s
import numpy as np
import Stemmer

from megatron_spear.envs.webshop.product import Product, numbers_by_attribute

MAX_RESULTS = 50
_K1, _B = 0.9, 0.4

# Lucene's English stop words.
_STOP_TEXT = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
)
_STOP_WORDS = frozenset(_STOP_TEXT.split())
# A word: letters and digits; a dot, comma or apostrophe stays inside where the same kind of
# character is on both sides of it ("3.5", "1,000", "don't"). A hyphen parts words.
_WORD = re.compile(r"\w+(?:(?<=[^\W\d_])['’.:](?=[^\W\d_])\w+|(?<=\d)[.,;'](?=\d)\w+)*", re.UNICODE)
_POSSESSIVES = ("'s", "’s")


class ProductSearch:
    """Finds products by words; gives their numbers in the list, the best first.

    - ``<r>`` draws 50 products;
    - ``<a> washable`` gives all with this attribute, ``<c> beauty`` all of this category and
      ``<q> cotton shirts`` all of this query, in the shop's order;
    - anything else gives the 50 best by BM25 (k1 0.9, b 0.4, after Porter's stemming) of those
      that have one of the words at all; the first in the shop's order where two are equal.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self._num_products = len(products)
        self._attributes = numbers_by_attribute(products)
        self._categories = _numbers(product.category for product in products)
        self._queries = _numbers(product.query for product in products)
        self._analyse = analyser()
        self._ranker: Any = bm25s.BM25(method="lucene", k1=_K1, b=_B)
        documents = [self._analyse(product.document) for product in products]
        self._searchable = any(documents)
        if self._searchable:
            self._ranker.index(documents, create_empty_token=False, show_progress=False)

    def find(self, text: str, seed: str) -> list[int]:
        """The numbers of the products for a query; ``seed`` keys what ``<r>`` draws."""
        words = text.split(" ")
        rest = " ".join(words[1:]).strip()
        match words[0]:
            case "<r>":
                count = min(MAX_RESULTS, self._num_products)
                return random.Random(f"webshop/{seed}").sample(range(self._num_products), count)
            case "<a>":
                return self._attributes.get(rest, [])
            case "<c>":
                return self._categories.get(words[1].strip() if len(words) > 1 else "", [])
            case "<q>":
                return self._queries.get(rest, [])
        return self.rank(text)

    def rank(self, text: str) -> list[int]:
        """The best products for a text; a word that is given twice counts twice."""
        if not self._searchable:
            return []
        ids = self._ranker.get_tokens_ids(self._analyse(text))
        if not ids:
            return []
        scores = self._ranker.get_scores_from_ids(ids)
        found = np.flatnonzero(scores > 0.0)
        scores = scores[found]
        if len(found) > MAX_RESULTS:
            # Among all products, most of which have equal scores of 0, this takes 20 times as long.
            last = np.partition(scores, len(scores) - MAX_RESULTS)[len(scores) - MAX_RESULTS]
            found, scores = found[scores >= last], scores[scores >= last]
        order = np.lexsort((found, -scores))
        return [int(number) for number in found[order][:MAX_RESULTS]]


def analyser() -> Callable[[str], list[str]]:
    """What turns a text into its terms, as Lucene's analyser of English does.

    Example: ``The women's running-shoes`` gives ``women``, ``run``, ``shoe``.
    """
    stemmer = Stemmer.Stemmer("porter")

    def analyse(text: str) -> list[str]:
        words = (_without_possessive(word).lower() for word in _WORD.findall(text))
        # One or two letters are never stemmed (Porter, 1980).
        return [
            stemmer.stemWord(word) if len(word) > 2 else word
            for word in words
            if word not in _STOP_WORDS
        ]

    return analyse


def _without_possessive(word: str) -> str:
    return word[:-2] if word.lower().endswith(_POSSESSIVES) else word


def _numbers(values: Iterable[str]) -> dict[str, list[int]]:
    """Value -> the places where it stands."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, value in enumerate(values):
        found[value].append(number)
    return dict(found)
