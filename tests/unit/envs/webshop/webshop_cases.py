"""A hand-made shop in the form of the official files, small enough to know by heart."""

import json

from megatron_spear.envs.webshop.goal import Goal
from megatron_spear.envs.webshop.product import parse_products
from megatron_spear.envs.webshop.shop import Shop

LAMP, CHAIR, SHIRT, TEA = "B000LAMP01", "B000CHAIR1", "B000SHIRT1", "B0000TEA01"


def row(asin, name, **changes):
    """A row of items_shuffle.json."""
    return {
        "asin": asin,
        "name": name,
        "full_description": f"About the {name}.",
        "small_description": [f"First of {name}", "Second"],
        "pricing": "$20.00",
        "images": ["https://example.org/1.jpg"],
        "product_category": "Home › Things",
        "category": "garden",
        "query": " Things ",
        "customization_options": "",
        "total_reviews": "12",
    } | changes


ROWS = [
    row(
        LAMP,
        "Brass Desk Lamp",
        product_category="Home & Garden › Lighting › Lamps",
        query="desk lamps",
        pricing="$24.99",
        customization_options={
            "Color": [{"value": " Navy Blue "}, {"value": "Black/Gold"}],
            "Size": [{"value": "Small"}, {"value": "Large"}],
            "Style": None,
        },
    ),
    row(
        CHAIR,
        "Oak Dining Chair",
        product_category="Home & Garden › Furniture › Chairs",
        query="dining chairs",
        pricing="$60.00 to $80.00",
    ),
    row(
        SHIRT,
        "Linen Summer Shirt",
        product_category="Clothing › Men › Shirts",
        category="fashion",
        query="mens shirts",
        pricing=None,
        small_description="Loose cut",
        customization_options={"size": [{"value": "small"}, {"value": "medium"}]},
    ),
    row(
        TEA,
        "Green Leaf Tea",
        product_category="Grocery › Drinks › Tea",
        category="grocery",
        query="leaf tea",
        pricing="$995.00",
        full_description="",
    ),
]
KNOWN = {
    LAMP: {
        "attributes": ["easy assembly", "energy saving"],
        "instruction": "Find me energy saving desk lamps",
        "instruction_attributes": ["energy saving", "easy assembly"],
    },
    CHAIR: {"attributes": ["solid wood"], "instruction": None, "instruction_attributes": None},
    SHIRT: {
        "attributes": ["machine wash"],
        "instruction": "Find me machine wash shirts",
        "instruction_attributes": ["machine wash"],
    },
}
HUMAN = {
    LAMP: [
        {
            "asin": LAMP,
            "instruction": "i need an energy saving lamp in blue.",
            "attributes": ["easy assembly", "energy saving"],
            "options": ["color: navy blue"],
            "instruction_attributes": ["energy saving"],
            "instruction_options": ["navy blue"],
            "assignment_id": "A1",
            "worker_id": "W1",
        },
        {
            "asin": LAMP,
            "instruction": "any lamp",
            "attributes": [],
            "options": [],
            "instruction_attributes": [],
            "instruction_options": [],
        },
    ],
    TEA: [
        {
            "asin": TEA,
            "instruction": "i want organic tea",
            "attributes": [],
            "options": [],
            "instruction_attributes": ["organic"],
            "instruction_options": [],
        }
    ],
    "B0NOTSOLD1": [],
}


def make_shop(rows=ROWS, known=KNOWN):
    """The shop of the rows."""
    return Shop(parse_products(rows, known, "rows"))


def goal(**changes):
    """A goal for the lamp."""
    values = {
        "id": "human/lamp",
        "asin": LAMP,
        "category": "garden",
        "query": "desk lamps",
        "name": "Brass Desk Lamp",
        "product_category": "Home & Garden › Lighting › Lamps",
        "instruction": "i need an energy saving lamp in blue, and price lower than 40.00 dollars",
        "attributes": ("energy saving",),
        "options": ("navy blue",),
        "price_upper": 40.0,
        "named": False,
    }
    return Goal(**(values | changes))


def write_files(folder, rows=ROWS, known=KNOWN, human=HUMAN):
    """The three official files; gives their paths as the settings name them."""
    contents = {"products": rows, "attributes": known, "instructions": human}
    paths = {name: folder / f"{name}.json" for name in contents}
    for name, values in contents.items():
        paths[name].write_text(json.dumps(values), encoding="utf-8")
    return paths
