"""WebShop on one core: searches a second by size of the shop, steps and resets a second.

Products are generated; queries are what the scripted shopper types for generated goals. Times are
CPU seconds of the process, so that a busy machine changes them little. A step is one of a walk over
all pages: search, next page, search, product, features, back, option, first page.

    python tools/benchmarks/webshop_search.py --products 1000 100000 --queries 200 --visits 200
"""

import argparse
import time
from collections.abc import Sequence

from megatron_spear.envs.webshop.demonstrations import search_words
from megatron_spear.envs.webshop.environment import WebshopEnvironment
from megatron_spear.envs.webshop.generator import generate_goal, generate_products
from megatron_spear.envs.webshop.goal import Goal
from megatron_spear.envs.webshop.shop import Shop, open_shop
from megatron_spear.types import PRODUCT_CATEGORIES


def measure_search(shop: Shop, goals: Sequence[Goal]) -> tuple[float, float]:
    """Searches a CPU second and a wall second."""
    queries = [search_words(goal.instruction) for goal in goals]
    wall, cpu = time.perf_counter(), time.process_time()
    for query in queries:
        shop.search.find(query, "0")
    return len(queries) / (time.process_time() - cpu), len(queries) / (time.perf_counter() - wall)


def measure_visits(
    num_products: int, goals: Sequence[Goal], admissible: bool
) -> tuple[float, float]:
    """Resets and steps a CPU second."""
    environment = WebshopEnvironment(num_products=num_products)
    resets = steps = 0.0
    taken = 0
    for goal in goals:
        options = {"goal": goal.to_fields(), "admissible": admissible}
        began = time.process_time()
        environment.reset(seed=0, options=options)
        resets += time.process_time() - began
        walk = [
            f"search[{search_words(goal.instruction)}]",
            "click[next >]",
            f"search[{goal.name}]",
            f"click[{goal.asin}]",
            "click[features]",
            "click[< prev]",
            f"click[{(goal.options or ('description',))[0]}]",
            "click[back to search]",
        ]
        began = time.process_time()
        for action in walk:
            environment.step(action)
        steps += time.process_time() - began
        taken += len(walk)
    return len(goals) / resets, taken / steps


def main() -> None:
    """One line a size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--products", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--visits", type=int, default=200)
    args = parser.parse_args()
    for size in args.products:
        products = generate_products(0, size)
        count = max(args.queries, args.visits)
        sample = products[: min(size, 2000)]
        goals = [
            generate_goal(sample, PRODUCT_CATEGORIES, 0, i, held_out=False) for i in range(count)
        ]
        began = time.process_time()
        shop = open_shop(num_products=size, seed=0)
        cpu_s = time.process_time() - began
        searches, on_the_clock = measure_search(shop, goals[: args.queries])
        resets, plain = measure_visits(size, goals[: args.visits], False)
        _, listed = measure_visits(size, goals[: args.visits], True)
        print(
            f"{size:7,} products: index made in {cpu_s:.1f} s, {searches:,.0f} searches/s "
            f"({on_the_clock:,.0f} by the clock); {resets:,.0f} resets/s, {plain:,.0f} steps/s "
            f"({listed:,.0f} with admissible actions), two of eight of them searches"
        )


if __name__ == "__main__":
    main()
