"""The closed word list of a generated shop, and the pieces that are one token each.

A tiny model reads a product in nine tokens: number, separator, brand, two attributes, noun,
separator, price, separator.
"""

from collections.abc import Sequence

from megatron_spear.envs.webshop.goal import PRICE_MARK
from megatron_spear.envs.webshop.pages import BACK, BUY, NEXT, PREVIOUS, SUB_PAGES
from megatron_spear.envs.webshop.product import Product
from megatron_spear.envs.webshop.prompts import OfficialView
from megatron_spear.envs.webshop.wares import DEPARTMENTS, OPENINGS
from megatron_spear.envs.words import GENERIC_WORDS, PUNCTUATION, prompt_texts, split_words

_MAX_NUMBER = 60  # of results and of pages, the official prompt's steps
_LIMITS = range(10, 1000, 10)

PHRASES = (
    "WebShop [SEP] Instruction: [SEP]",
    "Back to Search [SEP] Page",
    "(Total results: 50) [SEP] Next > [SEP]",
    "(Total results: 50) [SEP] < Prev [SEP] Next > [SEP]",
    "Back to Search [SEP] < Prev [SEP]",
    "[SEP] Price:",
    "[SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now",
    "[SEP] Search",
    "[SEP]",
    PRICE_MARK.strip(),
    ".00 dollars",
    *OPENINGS,
    *(f"click[ {name} ]" for name in (BUY, BACK, NEXT, PREVIOUS, *SUB_PAGES)),
    "search[",
    "click[",
)


def webshop_words(products: Sequence[Product]) -> tuple[str, ...]:
    """Every word and sign of a generated shop's pages and instructions, sorted, each once, in upper
    and lower case as in the texts; both prompt styles included."""
    words = {*PUNCTUATION, *"$&›", *map(str, range(_MAX_NUMBER + 1)), *map(str, _LIMITS), "00"}
    texts = [GENERIC_WORDS, *PHRASES, *prompt_texts(OfficialView()), "in and You clicked button_"]
    texts += [name.capitalize() for name in SUB_PAGES]
    for product in products:
        texts += [product.asin, product.title, product.description, *product.bullets]
        texts += [product.price_tag.replace("$", " "), product.category, product.query]
        texts += [product.product_category, *product.attributes]
        texts += [text for name, values in product.options.items() for text in (name, *values)]
    for text in texts:
        words.update(split_words(text))
    return tuple(sorted(words))


def webshop_phrases(products: Sequence[Product]) -> tuple[str, ...]:
    """`PHRASES`, the attributes of all departments and the price tags of the products."""
    attributes = [text for department in DEPARTMENTS.values() for text in department.attributes]
    tags = sorted({product.price_tag for product in products})
    return (*PHRASES, *attributes, *tags)
