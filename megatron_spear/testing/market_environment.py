"""A market stall: the smallest environment with tools, for tests and as a pattern for new ones."""

import random
from collections.abc import Mapping
from typing import Any

from megatron_spear.envs.tools.environment import Outcome, ToolEnvironment
from megatron_spear.envs.tools.tool import Tool, ToolFailure
from megatron_spear.envs.tools.view import ToolView

ITEMS = ("apple", "pear", "plum", "fig", "melon")
_MAX_DIGITS = 20


class MarketEnvironment(ToolEnvironment):
    """Say what a purchase costs, in cents; prices are drawn from the seed and must be asked for.

    Options of ``reset``: ``item`` and its ``price`` (default: drawn from the seed), ``count``
    (default 3). Reward 1.0 for the right sum. An answer that is no whole number is invalid, and the
    task goes on.
    """

    def __init__(self) -> None:
        self._prices: dict[str, int] = {}
        self._total = 0

    def start(self, seed: int, options: Mapping[str, Any]) -> str:
        """Draw the prices and the item."""
        rng = random.Random(seed)
        self._prices = {item: rng.randrange(10, 100) for item in ITEMS}
        item, count = str(options.get("item", rng.choice(ITEMS))), int(options.get("count", 3))
        self._prices[item] = int(options.get("price", self._prices[item]))
        self._total = count * self._prices[item]
        return f"What do {count} pieces of {item} cost, in cents? Answer with the number alone."

    def finish(self, content: str) -> Outcome:
        """A number ends the task, right or wrong."""
        if len(content) > _MAX_DIGITS or not (content.isascii() and content.isdigit()):
            return Outcome(over=False, valid=False, observation="Answer with a number.")
        won = content.lstrip("0") == str(self._total)
        return Outcome(float(won), won)

    def state(self) -> dict[str, Any]:
        """Nothing changes but by ending, so every sight of a task is the same."""
        return {"anchor": f"total {self._total}"}

    def price(self, item: str) -> str:
        """The price of one item."""
        if item not in self._prices:
            raise ToolFailure(f"there is no {item!r}; there are {', '.join(ITEMS)}")
        return str(self._prices[item])

    def multiply(self, a: int, b: int) -> str:
        """A product."""
        return str(int(a) * int(b))

    tools = (
        Tool(
            "price",
            "Price of one piece, in cents.",
            {
                "type": "object",
                "properties": {"item": {"type": "string", "description": "what to buy"}},
                "required": ["item"],
            },
            price,
        ),
        Tool(
            "multiply",
            "Product of two whole numbers.",
            {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
            multiply,
        ),
    )


class MarketView(ToolView):
    """Its view: an answer is a whole number."""

    def __init__(self) -> None:
        super().__init__(MarketEnvironment.tools)

    def answers(self, content: str) -> bool:
        """Whether it is a whole number."""
        return content.isascii() and content.isdigit()
