"""Products: from rows of the official files to what the shop sells."""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_spear.errors import DataError

NO_ATTRIBUTES = ("DUMMY_ATTR",)
"""The attributes of a product of which none are known."""

_MAX_ASIN = 10
_NO_PRICE = 100.0
_NOT_IN_A_PRICE = re.compile(r"[^\d.]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One product as the site shows it and as the reward judges it.

    ``price`` (dollars) is what is compared with a goal's limit, ``price_tag`` what is shown;
    ``options`` has the values that can be chosen, by the option's name.

    Example: asin ``B09KP78G37``, title ``Fox Red Cotton Shirt``, price_tag ``$12.5 to $20.0``,
    price 17.21, options ``{"size": ("small", "large")}``, attributes ``("machine wash",)``,
    category ``fashion``, query ``cotton shirts``, product_category ``Clothing › Men › Shirts``.
    """

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    price: float
    price_tag: str
    options: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    category: str
    query: str
    product_category: str

    @property
    def document(self) -> str:
        """What search reads: title, description, first bullet and options, lower-cased."""
        options = ", and ".join(
            f"{name}: {', '.join(values)}" for name, values in self.options.items()
        )
        first = self.bullets[0] if self.bullets else ""
        return " ".join((self.title, self.description, first, options)).lower()


def parse_products(
    rows: Iterable[Mapping[str, Any]], known: Mapping[str, Any], where: str
) -> list[Product]:
    """The products of ``items_shuffle*.json``'s rows, with attributes of ``items_ins_v2*.json``.

    A row whose asin is ``nan``, longer than ten characters or taken already is passed over, as in
    the official code. Raises DataError, which names ``where``, for a row that cannot be used.
    """
    products: dict[str, Product] = {}
    for number, row in enumerate(rows):
        try:
            asin = row["asin"]
            if asin != "nan" and len(asin) <= _MAX_ASIN and asin not in products:
                products[asin] = _parse_product(row, known.get(asin) or {})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}: product {number} cannot be read ({type(error).__name__}: {error}); "
                "expected a row of WebShop's items_shuffle.json"
            ) from error
    if not products:
        raise DataError(f"{where}: got no products, expected at least one; give a file that has")
    return list(products.values())


def parse_price(pricing: str | None) -> tuple[float, ...]:
    """The one or two prices of a ``pricing`` text, in dollars; () where there is none.

    Example: ``"$1,234.50"`` gives ``(1234.5,)``, ``"$5 to $7.25"`` gives ``(5.0, 7.25)``. Raises
    ValueError for a text without a price.
    """
    if not pricing:
        return ()
    prices = [float(_NOT_IN_A_PRICE.sub("", part)) for part in pricing.split("$")[1:]]
    if not prices:
        raise ValueError(f"pricing {pricing!r}: expected $ and a number")
    return tuple(prices[:2])


def numbers_by_attribute(products: Sequence[Product]) -> dict[str, list[int]]:
    """Attribute -> numbers of the products that have it, in order."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, product in enumerate(products):
        for attribute in dict.fromkeys(product.attributes):
            found[attribute].append(number)
    return dict(found)


def _parse_product(row: Mapping[str, Any], known: Mapping[str, Any]) -> Product:
    asin = str(row["asin"])
    price, tag = _price_and_tag(asin, parse_price(row.get("pricing")))
    bullets = row["small_description"]
    if not isinstance(bullets, list):
        bullets = [bullets]
    return Product(
        asin=asin,
        title=str(row["name"]),
        description=str(row["full_description"] or ""),
        bullets=tuple(str(bullet or "") for bullet in bullets),
        price=price,
        price_tag=tag,
        options=_options(row.get("customization_options")),
        attributes=tuple(map(str, known.get("attributes", NO_ATTRIBUTES))),
        category=str(row["category"]),
        query=str(row["query"]).lower().strip(),
        product_category=str(row["product_category"]),
    )


def _price_and_tag(asin: str, prices: tuple[float, ...]) -> tuple[float, str]:
    """One price of a range, drawn from the asin alone: the same in every process.

    The official code draws it anew in each process, so a limit inside the range may hold or not.
    """
    if not prices:
        return _NO_PRICE, f"${_NO_PRICE}"
    if len(prices) == 1:
        return prices[0], f"${prices[0]}"
    drawn = random.Random(f"webshop/price/{asin}").uniform(*prices)
    return drawn, f"${prices[0]} to ${prices[1]}"


def _options(raw: Any) -> dict[str, tuple[str, ...]]:
    if not raw:
        return {}
    return {
        str(name).lower(): tuple(
            str(content["value"]).strip().replace("/", " | ").lower() for content in contents
        )
        for name, contents in raw.items()
        if contents is not None
    }
