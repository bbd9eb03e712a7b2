"""The shop: products with their search, made once in a process."""

import functools
from collections.abc import Sequence
from pathlib import Path

from megatron_spear.envs.webshop.generator import generate_products
from megatron_spear.envs.webshop.product import Product
from megatron_spear.envs.webshop.search import ProductSearch
from megatron_spear.envs.webshop.sources import load_products
from megatron_spear.errors import DataError


class Shop:
    """What is on sale. Never changed, so all environments of a process share one."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = tuple(products)
        self.by_asin = {product.asin: product for product in self.products}
        self.search = ProductSearch(self.products)


@functools.lru_cache(maxsize=2)
def open_shop(
    products: str | None = None,
    attributes: str | None = None,
    num_products: int | None = None,
    seed: int = 0,
) -> Shop:
    """The shop of the official files (``items_shuffle*.json``, ``items_ins_v2*.json``), or without
    them a generated one of ``num_products``. Raises DataError."""
    if products is None and attributes is None and num_products is not None:
        return Shop(generate_products(seed, num_products))
    if products is None or attributes is None:
        raise DataError(
            f"products={products}, attributes={attributes}, num_products={num_products}; expected "
            "both files, or for a generated shop neither and a number of products"
        )
    return Shop(load_products(Path(products), Path(attributes), num_products))
