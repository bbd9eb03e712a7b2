"""Demonstrations for the warm start: shopping as a policy should, with slips to recover from.

The shopper searches with words of the instruction and goes through the results from the top. It
opens what fits by title and price, which is all that the results show, and goes back where an
option is missing; only when its patience ends it goes straight to a product that has them.
"""

import contextlib
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_spear.envs.demonstration import Demonstration, DemonstrationTurn, patience
from megatron_spear.envs.webshop.goal import PRICE_MARK, Goal
from megatron_spear.envs.webshop.pages import BUY, NEXT, PREVIOUS
from megatron_spear.envs.webshop.product import Product
from megatron_spear.envs.webshop.reward import Nouns, judge, option_hits
from megatron_spear.envs.webshop.session import Session, parse_action
from megatron_spear.envs.webshop.shop import Shop

MAX_EXPLORE = 4  # most products looked at in vain
MAX_SLIPS = 3  # most impossible actions in a row

# How instructions begin, word by word; what follows is searched for.
_OPENING_TEXT = (
    "i am im i'm looking to for a an the some need want would like find me show buy get please can "
    "you searching"
)
_OPENING_WORDS = frozenset(_OPENING_TEXT.split())
_BRACKETS = re.compile(r"[\[\]\s]+")


def demonstrate(
    shop: Shop,
    goal: Goal,
    rng: random.Random,
    nouns: Nouns,
    *,
    explore: float,
    noise: float,
    max_turns: int,
    admissible: bool = False,
    rich: bool = False,
    show_attributes: bool = False,
) -> Demonstration | None:
    """Shop for ``goal`` to the purchase.

    Args:
        shop: where.
        goal: any goal of the shop.
        rng: where all chance comes from.
        nouns: the reward's.
        explore: mean number of products opened in vain before the hint (geometric, at most
            `MAX_EXPLORE`).
        noise: chance, before each action, of a slip: an impossible action, which changes nothing
            and is marked ``trained=False``; after a slip, of one more (at most `MAX_SLIPS` in a
            row).
        max_turns: most turns, slips included.
        admissible: note the possible actions of each turn (the official prompt lists them).
        rich: pages in the observation mode ``text_rich``.
        show_attributes: as the environment's.

    Returns:
        The demonstration; None when no product found would reach the goal, or not within
        ``max_turns``.
    """
    session = Session(shop, goal, rng.randrange(2**31), show_attributes=show_attributes)
    shopper = _Shopper(session, rng, noise, max_turns, admissible, rich)
    with contextlib.suppress(_GivenUp):
        if _shop_for(shopper, goal, nouns, patience(rng, explore, MAX_EXPLORE)):
            return Demonstration(tuple(shopper.turns))
    return None


def search_words(instruction: str) -> str:
    """What a shopper types: the instruction without its opening words, its options and its price.

    Options are taken to follow the first "in" that has two words or more before it; they are for
    the product's page. Example: ``i need a slim fitting shirt in size small, and price lower than
    40.00 dollars`` gives ``slim fitting shirt``.
    """
    text = _BRACKETS.sub(" ", instruction.rpartition(PRICE_MARK)[0] or instruction)
    words = text.replace(",", "").split()
    opening = 0
    while opening < len(words) - 1 and words[opening].lower() in _OPENING_WORDS:
        opening += 1
    words = words[opening:]
    end = next((i for i, word in enumerate(words) if word == "in" and i >= 2), len(words))
    return " ".join(words[:end])


def options_for(product: Product, goal: Goal) -> dict[str, str]:
    """The value to choose of each option, in the order in which the goal asks for them.

    A product that lacks one is left without it.
    """
    chosen: dict[str, str] = {}
    for wanted in goal.options:
        alone = replace(goal, options=(wanted,))
        for name, values in product.options.items():
            fitting = [value for value in values if option_hits([value], alone)]
            if fitting and name not in chosen:
                chosen[name] = fitting[0]
                break
    return chosen


class _GivenUp(Exception):
    """The turns are used up, or there is no action for what has to be done (a value with a bracket
    in it)."""


class _Shopper:
    """Acts in a session and remembers the turns."""

    def __init__(
        self,
        session: Session,
        rng: random.Random,
        noise: float,
        max_turns: int,
        admissible: bool,
        rich: bool,
    ) -> None:
        self.session, self.rng = session, rng
        self.turns: list[DemonstrationTurn] = []
        self._noise, self._max_turns = noise, max_turns
        self._admissible, self._rich = admissible, rich

    def do(self, action: str) -> None:
        """One action to learn, after slips now and then."""
        for _ in range(MAX_SLIPS):
            if self.rng.random() >= self._noise:
                break
            slip = self._impossible_action()
            if slip is not None:
                self._turn(slip, trained=False)
        self._turn(action, trained=True)
        if not self.session.buys(action) and not self.session.act(action):
            raise _GivenUp

    def _turn(self, action: str, *, trained: bool) -> None:
        if len(self.turns) >= self._max_turns:
            raise _GivenUp
        info: dict[str, Any] = {"task": self.session.goal.instruction}
        if self._admissible:
            info["admissible"] = self.session.admissible()
        page = self.session.page
        observation = page.rich_text() if self._rich else page.text()
        self.turns.append(DemonstrationTurn(observation, action, trained, info))

    def _impossible_action(self) -> str | None:
        """Something like what a young policy gets wrong; None when five tries were possible."""
        clickables = self.session.page.clickables()
        for _ in range(5):
            action = f"click[{self.rng.choice(_SLIPS)(self)}]"
            parsed = parse_action(action)
            if parsed is None or parsed[1] not in clickables:
                return action
        return None

    def some_option(self) -> str:
        """A value that the goal asks for; the purchase while it asks for none."""
        return self.rng.choice(self.session.goal.options or (BUY,)).rpartition(": ")[2]

    def some_word(self) -> str:
        """A word of the instruction."""
        return self.rng.choice(search_words(self.session.goal.instruction).split() or [BUY])


_SLIPS: tuple[Callable[[_Shopper], str], ...] = (
    lambda _: BUY,
    _Shopper.some_option,
    _Shopper.some_word,
    lambda _: PREVIOUS,
    lambda _: NEXT,
)


def _shop_for(shopper: _Shopper, goal: Goal, nouns: Nouns, to_look_at: int) -> bool:
    """Search, find the product, choose, buy; False where no result fits."""
    session = shopper.session
    without_options = replace(goal, options=())
    shopper.do(f"search[{search_words(goal.instruction)}]")
    while session.shown:
        for product in session.shown:
            chosen = options_for(product, goal)
            if judge(product, chosen, goal, nouns).won:
                shopper.do(f"click[{product.asin}]")
                for value in chosen.values():
                    shopper.do(f"click[{value}]")
                shopper.do(f"click[{BUY}]")
                # Of two options with the same value, the other one may have been meant.
                return judge(product, session.chosen, goal, nouns).won
            if to_look_at > 0 and judge(product, {}, without_options, nouns).won:
                to_look_at -= 1
                shopper.do(f"click[{product.asin}]")
                shopper.do(f"click[{PREVIOUS}]")
        shopper.do(f"click[{NEXT}]")
    return False
