"""One visit to the shop: where the shopper is, what was chosen, and what an action changes."""

from collections.abc import Mapping

from megatron_spear.envs.webshop.goal import Goal
from megatron_spear.envs.webshop.pages import (
    BACK,
    BUY,
    NEXT,
    PREVIOUS,
    PRODUCTS_A_PAGE,
    SEARCH_FORM,
    SUB_PAGES,
    Page,
    Piece,
    item_page,
    results_page,
    search_page,
    sub_page,
)
from megatron_spear.envs.webshop.product import Product
from megatron_spear.envs.webshop.shop import Shop

MAX_ACTION = 4096
"""Longest action that is read, in characters."""


def parse_action(text: str) -> tuple[str, str] | None:
    """("search" or "click", what is in the brackets, lower-cased); None for anything else.

    Of several brackets the last ones count, and what follows them does not, as in the official
    code. Example: ``click[Buy Now] please`` gives ("click", "buy now"); ``Click[x]``,
    ``search[ ]`` and ``click[a] [b]`` give None.
    """
    stripped = text.strip()
    if len(stripped) > MAX_ACTION:
        return None
    line = stripped.split("\n", 1)[0]
    closing = line.rfind("]")
    opening = line.rfind("[", 0, max(closing - 1, 0))
    verb, argument = line[: max(opening, 0)], line[opening + 1 : max(closing, 0)].lower()
    return (verb, argument) if verb in ("search", "click") and argument.strip() else None


class Session:
    """A visit for one goal; ``seed`` keys what the query ``<r>`` draws.

    The page is ``search``, ``results``, ``item`` or one of `SUB_PAGES`.
    """

    def __init__(self, shop: Shop, goal: Goal, seed: int, *, show_attributes: bool) -> None:
        self.goal = goal
        self._shop, self._seed, self._show_attributes = shop, seed, show_attributes
        self._num_searches = 0
        self._open_first_page()
        self.page = self._render()

    @property
    def product(self) -> Product | None:
        """The product that is looked at."""
        return self._product

    @property
    def chosen(self) -> Mapping[str, str]:
        """The chosen value of each option that has been clicked."""
        return self._chosen

    @property
    def shown(self) -> list[Product]:
        """The products on the page of results that was seen last."""
        first = (self._number - 1) * PRODUCTS_A_PAGE
        numbers = self._results[first : first + PRODUCTS_A_PAGE]
        return [self._shop.products[number] for number in numbers]

    def admissible(self) -> list[str]:
        """Every click, and the form of a search where the page has a search bar.

        A search is understood on every page.
        """
        clicks = [f"click[{name}]" for name in self.page.clickables() if name != "search"]
        return [SEARCH_FORM, *clicks] if self.page.has_search_bar else clicks

    def buys(self, action: str) -> bool:
        """Whether an action is the purchase, on a page that has its button."""
        return parse_action(action) == ("click", BUY) and BUY in self.page.clickables()

    def act(self, action: str) -> bool:
        """Go where an action leads, purchases aside; False where it means nothing here."""
        parsed = parse_action(action)
        if parsed is None:
            return False
        verb, argument = parsed
        if verb == "search":
            self._search(argument)
        else:
            target = self.page.clickables().get(argument)
            if target is None or argument in ("search", BUY):
                return False
            self._click(argument, target)
        self.page = self._render()
        return True

    def _open_first_page(self) -> None:
        self._place = "search"
        self._results: list[int] = []
        self._number = 1
        self._visited: set[str] = set()
        self._leave_product()

    def _leave_product(self) -> None:
        self._product: Product | None = None
        self._chosen: dict[str, str] = {}

    def _search(self, words: str) -> None:
        self._num_searches += 1
        self._results = self._shop.search.find(words, f"{self._seed}/{self._num_searches}")
        self._show_results(1)

    def _show_results(self, number: int) -> None:
        self._place, self._number = "results", number
        self._leave_product()

    def _click(self, name: str, target: Piece) -> None:
        """A click; the names of buttons come before options of the same name."""
        if name == BACK:
            self._open_first_page()
        elif name in (NEXT, PREVIOUS) and self._place == "results":
            self._show_results(self._number + (1 if name == NEXT else -1))
        elif name == PREVIOUS and self._place == "item":
            self._show_results(self._number)
        elif name == PREVIOUS:
            self._place = "item"
        elif name in SUB_PAGES:
            self._place = name
        elif target.role == "product":
            self._product = self._shop.by_asin[target.text]
            self._visited.add(target.text)
            self._place = "item"
        else:
            self._chosen[target.option] = target.text

    def _render(self) -> Page:
        text = self.goal.instruction
        if self._place == "search":
            return search_page(text)
        if self._place == "results":
            return results_page(text, self.shown, self._number, len(self._results), self._visited)
        assert self._product is not None, "only a product has such pages"
        if self._place == "item":
            return item_page(
                text, self._product, self._chosen, show_attributes=self._show_attributes
            )
        return sub_page(text, self._product, self._place)
