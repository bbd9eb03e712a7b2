"""The shop: products with their search, made once in a process."""

import functools
from collections.abc import Sequence
from pathlib import Path

from megatron_spear.envs.webshop.generator import generate_products
from megatron_spear.envs.webshop.product import Product
from megatron_spear.envs.webshop.search import ProductSearch
from megatron_spear.envs.webshop.sources import load_products


class Shop:
    """What is on sale. Never changed, so all environments of a process share one."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = tuple(products)
        self.by_asin = {product.asin: product for product in self.products}
        self.search = ProductSearch(self.products)


@functools.lru_cache(maxsize=2)
def loaded_shop(products: str, attributes: str, num_products: int | None) -> Shop:
    """The shop of the official files. Raises DataError."""
    return Shop(load_products(Path(products), Path(attributes), num_products))


@functools.lru_cache(maxsize=2)
def generated_shop(seed: int, num_products: int) -> Shop:
    """A generated shop."""
    return Shop(generate_products(seed, num_products))
