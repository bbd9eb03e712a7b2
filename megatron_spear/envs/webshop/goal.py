"""Goals: what a shopper is asked to buy, written by people or put together from attributes."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_spear.envs.webshop.product import Product
from megatron_spear.errors import DataError

SHUFFLE_SEED = 233
"""Of the official order of goals, whose first 500 are the test split by convention."""

NO_LIMIT = 1_000_000.0
PRICE_MARK = ", and price lower than "
_PRICES = tuple(10.0 * number for number in range(1, 100))
_CANDIDATES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What to buy, in words (``instruction``) and as the reward judges it.

    ``price_upper`` is in dollars. ``options`` are values (``"red"``), or with ``named`` name and
    value (``"color: red"``), as synthetic goals have them; the reward compares them differently.

    Example: instruction ``i need a red cotton shirt, and price lower than 40.00 dollars``,
    attributes ``("cotton",)``, options ``("red",)``, price_upper 40.0.
    """

    id: str
    asin: str
    category: str
    query: str
    name: str
    product_category: str
    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    price_upper: float
    named: bool = False

    def to_fields(self) -> dict[str, Any]:
        """Plain values, for reset options and JSON."""
        return asdict(self)

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> "Goal":
        """The goal of `to_fields`. Raises DataError for anything else."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise DataError(
                f"a goal has the fields {sorted(map(str, values))}; expected {sorted(names)}"
            )
        lists = {name: values[name] for name in ("attributes", "options")}
        texts = {k: v for k, v in values.items() if k not in {*lists, "price_upper", "named"}}
        if (
            not all(isinstance(text, str) for text in texts.values())
            or not all(_is_texts(entry) for entry in lists.values())
            or not isinstance(values["price_upper"], int | float)
        ):
            raise DataError(
                f"goal {values['id']!r} has values of the wrong kind; expected texts, lists of "
                "texts in attributes and options, a number in price_upper"
            )
        return cls(
            **texts,
            attributes=tuple(lists["attributes"]),
            options=tuple(lists["options"]),
            price_upper=float(values["price_upper"]),
            named=bool(values["named"]),
        )


def human_goals(products: Sequence[Product], instructions: Mapping[str, Any]) -> list[Goal]:
    """The goals of ``items_human_ins.json``, in the official order.

    One for each instruction of a product on sale that has ``instruction_attributes``. Raises
    DataError for an instruction that cannot be read.
    """
    return _shuffled(
        goal
        for product in products
        for number, row in enumerate(_rows(instructions, product.asin))
        if (goal := human_goal(product, row, f"human/{product.asin}/{number}")) is not None
    )


def human_goal(product: Product, row: Mapping[str, Any], name: str) -> Goal | None:
    """One instruction as a goal; None where it asks for no attribute. ``name`` keys the draw of its
    price limit and is its id."""
    try:
        attributes = tuple(map(str, row["instruction_attributes"]))
        if not attributes:
            return None
        upper, limit_text = price_limit(product.price, random.Random(f"webshop/limit/{name}"))
        options = tuple(map(str, row["instruction_options"]))
        text = row["instruction"].strip(".") + limit_text
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"instruction {name} cannot be read ({type(error).__name__}: {error}); expected a row "
            "of WebShop's items_human_ins.json"
        ) from error
    return _goal(product, name, text, attributes, options, upper, named=False)


def synthetic_goals(products: Sequence[Product], known: Mapping[str, Any]) -> list[Goal]:
    """The goals of ``items_ins_v2*.json``, in the official order.

    One for each choice of one value of every option of a product that has an instruction; all of
    a product share its price limit.
    """
    return _shuffled(
        goal for product in products for goal in _choices(product, known.get(product.asin) or {})
    )


def price_limit(price: float, rng: random.Random) -> tuple[float, str]:
    """(upper limit in dollars, its words): drawn among the four tens above the price.

    The larger of two that are drawn, so never the lowest; (1e6, "") where there are not two below
    1,000. Example: a price of 23 gives 40, 50 or 60.
    """
    candidates = [limit for limit in _PRICES if limit > price][:_CANDIDATES]
    if len(candidates) < 2:
        return NO_LIMIT, ""
    upper = max(rng.sample(candidates, 2))
    return upper, f"{PRICE_MARK}{upper:.2f} dollars"


def _choices(product: Product, known: Mapping[str, Any]) -> Iterator[Goal]:
    instruction = known.get("instruction")
    if instruction is None:
        return
    attributes = tuple(map(str, known.get("instruction_attributes") or ()))
    if not attributes:
        raise DataError(
            f"product {product.asin} has an instruction without instruction_attributes; expected "
            "at least one: mend items_ins_v2.json"
        )
    rng = random.Random(f"webshop/limit/synthetic/{product.asin}")
    upper, limit_text = price_limit(product.price, rng)
    names = sorted(product.options)
    for number, values in enumerate(itertools.product(*(product.options[n] for n in names))):
        options = tuple(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        wanted = f" with {', and '.join(options)}" if options else ""
        text = f"{instruction}{wanted}{limit_text}"
        name = f"synthetic/{product.asin}/{number}"
        yield _goal(product, name, text, attributes, options, upper, named=True)


def _goal(
    product: Product,
    name: str,
    text: str,
    attributes: tuple[str, ...],
    options: tuple[str, ...],
    upper: float,
    *,
    named: bool,
) -> Goal:
    return Goal(
        id=name,
        asin=product.asin,
        category=product.category,
        query=product.query,
        name=product.title,
        product_category=product.product_category,
        instruction=text,
        attributes=attributes,
        options=options,
        price_upper=upper,
        named=named,
    )


def _shuffled(goals: Iterator[Goal]) -> list[Goal]:
    made = list(goals)
    random.Random(SHUFFLE_SEED).shuffle(made)
    return made


def _rows(instructions: Mapping[str, Any], asin: str) -> Sequence[Mapping[str, Any]]:
    rows = instructions.get(asin, [])
    if not isinstance(rows, list):
        raise DataError(
            f"the instructions of {asin} are a {type(rows).__name__}; expected a list, as in "
            "WebShop's items_human_ins.json"
        )
    return rows


def _is_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)
