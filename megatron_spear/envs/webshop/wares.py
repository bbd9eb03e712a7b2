"""What generated shops sell: few words, so that a tiny model can know them all."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_spear.types import ProductCategory


@dataclass(frozen=True, slots=True)
class Ware:
    """One kind of product: its noun, the query it was found by, the last parts of its category
    path and its range of prices in dollars."""

    noun: str
    query: str
    path: tuple[str, str]
    prices: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Department:
    """A category: its kinds, what can be said of any of them, and their options."""

    path: str
    wares: tuple[Ware, ...]
    attributes: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]


_COLORS = ("red", "blue", "green", "black", "white", "pink")
_SIZES = ("small", "medium", "large")

DEPARTMENTS: dict[ProductCategory, Department] = {
    "beauty": Department(
        path="Beauty",
        wares=(
            Ware("shampoo", "hair shampoo", ("Hair Care", "Shampoo"), (6, 38)),
            Ware("lotion", "body lotion", ("Skin Care", "Lotion"), (5, 42)),
            Ware("lipstick", "matte lipstick", ("Makeup", "Lipstick"), (4, 35)),
            Ware("perfume", "spray perfume", ("Fragrance", "Perfume"), (15, 75)),
        ),
        attributes=(
            "cruelty free",
            "paraben free",
            "long lasting",
            "plant based",
            "dermatologist tested",
            "fast absorbing",
            "travel sized",
        ),
        options={"scent": ("vanilla", "coconut", "citrus", "jasmine"), "size": _SIZES},
    ),
    "electronics": Department(
        path="Electronics",
        wares=(
            Ware("headphones", "over ear headphones", ("Audio", "Headphones"), (18, 120)),
            Ware("speaker", "desk speaker", ("Speakers", "Desk Speakers"), (15, 110)),
            Ware("charger", "wall charger", ("Power", "Chargers"), (7, 45)),
            Ware("keyboard", "computer keyboard", ("Computers", "Keyboards"), (12, 95)),
        ),
        attributes=(
            "noise cancelling",
            "fast charging",
            "water proof",
            "light weight",
            "hands free",
            "high speed",
            "energy saving",
        ),
        options={"color": _COLORS, "model": ("basic", "plus", "studio")},
    ),
    "fashion": Department(
        path="Clothing",
        wares=(
            Ware("shirt", "button shirt", ("Men", "Shirts"), (9, 48)),
            Ware("jacket", "winter jacket", ("Outdoor", "Jackets"), (25, 130)),
            Ware("boots", "ankle boots", ("Shoes", "Boots"), (22, 115)),
            Ware("dress", "summer dress", ("Women", "Dresses"), (14, 70)),
        ),
        attributes=(
            "machine washable",
            "long sleeved",
            "slim fitting",
            "quick drying",
            "hand made",
            "wrinkle resistant",
            "cotton lined",
        ),
        options={"color": _COLORS, "size": _SIZES},
    ),
    "garden": Department(
        path="Home & Garden",
        wares=(
            Ware("lamp", "table lamp", ("Lighting", "Lamps"), (12, 85)),
            Ware("chair", "dining chair", ("Furniture", "Chairs"), (30, 150)),
            Ware("curtain", "window curtain", ("Windows", "Curtains"), (10, 60)),
            Ware("pillow", "throw pillow", ("Bedding", "Pillows"), (8, 40)),
        ),
        attributes=(
            "space saving",
            "easy cleaning",
            "heavy duty",
            "hand painted",
            "eco friendly",
            "fade proof",
            "dust repellent",
        ),
        options={"color": _COLORS, "style": ("modern", "rustic", "classic")},
    ),
    "grocery": Department(
        path="Grocery",
        wares=(
            Ware("coffee", "ground coffee", ("Beverages", "Coffee"), (8, 36)),
            Ware("tea", "loose tea", ("Drinks", "Tea"), (5, 30)),
            Ware("chips", "snack chips", ("Snacks", "Chips"), (3, 24)),
            Ware("granola", "breakfast granola", ("Breakfast", "Granola"), (4, 28)),
        ),
        attributes=(
            "gluten free",
            "low sodium",
            "fair trade",
            "slow roasted",
            "keto friendly",
            "sugar reduced",
            "kosher certified",
        ),
        options={"flavor": ("honey", "cherry", "ginger", "hazelnut"), "pack": ("single", "family")},
    ),
}

_BRAND_NAMES = (
    "Acorn Birch Cedar Comet Delta Ember Falcon Fjord Harbor Juniper Kestrel Lumen Maple Nimbus "
    "Orchid Pioneer Quartz Summit Tundra Willow"
)
BRANDS = tuple(_BRAND_NAMES.split())

OPENINGS = (
    "i need a",
    "i am looking for a",
    "i want to buy a",
    "find me a",
    "i would like a",
    "show me a",
)
"""How generated instructions begin."""
