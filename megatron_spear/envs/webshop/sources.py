"""WebShop's official files, read into plain values."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_spear.envs.webshop.goal import Goal, human_goals, synthetic_goals
from megatron_spear.envs.webshop.product import Product, parse_products
from megatron_spear.errors import DataError


@functools.lru_cache(maxsize=2)
def load_products(
    products: Path, attributes: Path, num_products: int | None
) -> tuple[Product, ...]:
    """The products of ``items_shuffle*.json`` with the attributes of ``items_ins_v2*.json``; of
    the first ``num_products`` rows where that is given. Raises DataError."""
    rows = _read(products, list)
    return tuple(parse_products(rows[:num_products], _read(attributes, dict), str(products)))


def load_human_goals(products: tuple[Product, ...], instructions: Path) -> list[Goal]:
    """The goals of ``items_human_ins.json`` for these products, shuffled as the official code does.

    Raises DataError, also where there is none.
    """
    return _some(human_goals(products, _read(instructions, dict)), instructions)


def load_synthetic_goals(products: tuple[Product, ...], attributes: Path) -> list[Goal]:
    """The goals of ``items_ins_v2*.json`` for these products, shuffled as the official code does.

    Raises DataError, also where there is none.
    """
    return _some(synthetic_goals(products, _read(attributes, dict)), attributes)


def file_sha256(path: Path) -> str:
    """sha256 of a file's contents. Raises DataError where it cannot be read."""
    try:
        with path.expanduser().open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _some(goals: list[Goal], path: Path) -> list[Goal]:
    if not goals:
        raise DataError(
            f"{path} has no goal for any of the products; expected the file that belongs to "
            "env.products, or more of env.num_products"
        )
    return goals


def _read(path: Path, kind: type) -> Any:
    """The JSON of a file, a list or a map."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path} is no JSON ({error}); download it again, it may be cut off"
        ) from error
    if not isinstance(values, kind):
        expected = "a list" if kind is list else "a map by asin"
        raise DataError(
            f"{path} has a {type(values).__name__} at the top; expected {expected}, as in "
            "WebShop's file of that kind"
        )
    return values


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read ({error}); expected one of WebShop's data files (docs/webshop.md "
        "says where they are)"
    )
