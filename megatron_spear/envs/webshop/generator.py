"""Generated shops and goals in the schema of the official files.

The shop of a seed, and goal ``index`` of a seed, depend on nothing else, so they can be made
anywhere and in any order.
"""

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from megatron_spear.envs.webshop.goal import Goal, human_goal
from megatron_spear.envs.webshop.product import Product, parse_products
from megatron_spear.envs.webshop.wares import BRANDS, DEPARTMENTS, OPENINGS, Department, Ware
from megatron_spear.errors import DataError

_ASIN_SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_RANGE, _NO_PRICE = 0.1, 0.03  # chances of "$a to $b" and of no price
_HIDDEN = 0.15  # chance of asking for the attribute that no title names
_SECOND_ATTRIBUTE = 0.6
_OPTION = 0.7  # chance that an option is asked for
_FOLDS = 5  # one of so many goals is kept for evaluation
_MAX_TRIES = 1000


def generate_rows(seed: int, num_products: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A shop as the official files have it: rows of ``items_shuffle.json``, and by asin the
    attributes of ``items_ins_v2.json``.

    The categories and the kinds of products in them take turns. A title has two attributes, the
    first bullet a third.
    """
    rng = random.Random(f"webshop/products/{seed}")
    rows: dict[str, dict[str, Any]] = {}
    known: dict[str, Any] = {}
    categories = list(DEPARTMENTS)
    while len(rows) < num_products:
        number = len(rows)
        category = categories[number % len(categories)]
        department = DEPARTMENTS[category]
        ware = department.wares[number // len(categories) % len(department.wares)]
        asin = "B0" + "".join(rng.choices(_ASIN_SIGNS, k=8))
        if asin not in rows:
            attributes = rng.sample(department.attributes, 3)
            rows[asin] = {
                "asin": asin,
                "category": category,
                **_draw_row(rng, department, ware, attributes),
            }
            known[asin] = _instruction(ware, attributes)
    return list(rows.values()), known


@functools.lru_cache(maxsize=2)
def generate_products(seed: int, num_products: int) -> tuple[Product, ...]:
    """The products of `generate_rows`."""
    rows, known = generate_rows(seed, num_products)
    return tuple(parse_products(rows, known, f"generated shop {seed}"))


def generate_goal(
    products: Sequence[Product],
    categories: Sequence[str],
    seed: int | str,
    index: int,
    *,
    held_out: bool,
) -> Goal:
    """Goal ``index`` of a seed for one of the products, which can be bought for a reward of 1.

    What a goal asks for (product, attributes, options) decides whether it is ``held_out``: a fifth
    is, and none of it is ever given otherwise, whatever the seeds.

    Raises DataError where no product is of one of the categories.
    """
    fitting = [product for product in products if product.category in categories]
    if not fitting:
        raise DataError(
            f"the shop has no product of {', '.join(categories)}; expected one: raise "
            "env.shop.products or name other env.categories"
        )
    rng = random.Random(f"webshop/goal/{seed}/{index}")
    for _ in range(_MAX_TRIES):
        product = rng.choice(fitting)
        row = generate_instruction(product, rng)
        if _is_held_out(row) == held_out:
            goal = human_goal(product, row, f"generated/{seed}/{index}")
            assert goal is not None, "a generated instruction asks for an attribute"
            return goal
    raise DataError(
        f"the shop has too few different goals: none of {_MAX_TRIES} drawn ones was for "
        f"{'evaluation' if held_out else 'training'}; raise env.shop.products"
    )


def generate_instruction(product: Product, rng: random.Random) -> dict[str, Any]:
    """A row of ``items_human_ins.json`` for a generated product.

    Example: ``i need a slim fitting quick drying shirt in color red and size small``.
    """
    titled, hidden = list(product.attributes[:2]), product.attributes[2]
    attributes = rng.sample(titled, 2 if rng.random() < _SECOND_ATTRIBUTE else 1)
    if rng.random() < _HIDDEN:
        attributes[-1] = hidden
    options = {
        name: rng.choice(values)
        for name, values in product.options.items()
        if rng.random() < _OPTION
    }
    noun = product.title.rsplit(" ", 1)[1]
    wanted = " and ".join(f"{name} {value}" for name, value in options.items())
    what = f"{' '.join(attributes)} {noun}" + (f" in {wanted}" if wanted else "")
    return {
        "asin": product.asin,
        "instruction": f"{rng.choice(OPENINGS)} {what}",
        "attributes": list(product.attributes),
        "options": [f"{name}: {value}" for name, value in options.items()],
        "instruction_attributes": attributes,
        "instruction_options": list(options.values()),
    }


def _draw_row(
    rng: random.Random, department: Department, ware: Ware, attributes: Sequence[str]
) -> dict[str, Any]:
    brand, (first, second, hidden) = rng.choice(BRANDS), attributes
    options = {
        name: [{"value": value} for value in _some(rng, values)]
        for name, values in department.options.items()
    }
    return {
        "name": f"{brand} {first} {second} {ware.noun}",
        "full_description": f"The {brand} {ware.noun} is {first} and {second}.",
        "small_description": [f"It is {hidden}.", f"Made by {brand} for every day."],
        "pricing": _draw_price(rng, ware.prices),
        "images": [""],
        "product_category": " › ".join((department.path, *ware.path)),
        "query": ware.query,
        "customization_options": options,
    }


def _some(rng: random.Random, values: Sequence[str]) -> list[str]:
    """At least two of the values, in their order."""
    chosen = rng.sample(values, rng.randint(2, len(values)))
    return sorted(chosen, key=values.index)


def _draw_price(rng: random.Random, prices: tuple[int, int]) -> str | None:
    price, kind = rng.randint(*prices), rng.random()
    if kind < _NO_PRICE:
        return None
    if kind < _NO_PRICE + _RANGE:
        return f"${price}.99 to ${price + rng.randint(1, 9)}.99"
    return f"${price}.99"


def _instruction(ware: Ware, attributes: Sequence[str]) -> dict[str, Any]:
    wanted = list(attributes[:2])
    return {
        "attributes": list(attributes),
        "instruction": f"Find me {' '.join(wanted)} {ware.noun}",
        "instruction_attributes": wanted,
    }


def _is_held_out(row: dict[str, Any]) -> bool:
    asked = [row["asin"], sorted(row["instruction_attributes"]), row["options"]]
    digest = hashlib.sha256(json.dumps(asked).encode()).digest()
    return digest[0] % _FOLDS == 0
