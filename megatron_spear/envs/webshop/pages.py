"""The pages of the site as lists of pieces, and their two renderings as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_spear.envs.webshop.product import Product

PRODUCTS_A_PAGE = 10
BUY, BACK, NEXT, PREVIOUS = "buy now", "back to search", "next >", "< prev"
SUB_PAGES = ("description", "features", "reviews", "attributes")
SEARCH_FORM = "search[...]"
SEPARATOR = " [SEP] "
_RATING = "N.A."  # ratings and reviews are in none of the files


class Piece(NamedTuple):
    """One visible text; ``role`` says what a click on it does, ``clicked`` whether one has."""

    text: str
    role: Literal["text", "button", "product", "option"] = "text"
    clicked: bool = False
    option: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """What is shown, from top to bottom; ``has_search_bar`` is true of the first page alone."""

    pieces: tuple[Piece, ...]
    has_search_bar: bool = False

    def clickables(self) -> dict[str, Piece]:
        """What can be clicked, lower-cased; of two with the same name the later one counts.

        Buttons and products come before options, as in the official code.
        """
        pieces = [piece for piece in self.pieces if piece.text.strip()]
        found = {p.text.lower(): p for p in pieces if p.role in ("button", "product")}
        return found | {p.text: p for p in pieces if p.role == "option"}

    def text(self) -> str:
        """Observation mode ``text``: the visible strings with `` [SEP] `` between them."""
        shown = [piece.text.strip() for piece in self.pieces]
        return SEPARATOR.join(text for text in shown if text)

    def rich_text(self) -> str:
        """Observation mode ``text_rich``: a line each, with marks around what can be clicked."""
        lines = [_marked(piece) for piece in self.pieces if piece.text.strip()]
        clicked = [p.text for p in self.pieces if p.role == "option" and p.clicked]
        return "".join(f"You have clicked {text}.\n" for text in reversed(clicked)) + "".join(
            f"{line}\n" for line in lines
        )


def search_page(instruction: str) -> Page:
    """The first page."""
    pieces = (Piece("WebShop"), *_instruction(instruction), Piece("Search", "button"))
    return Page(pieces, has_search_bar=True)


def results_page(
    instruction: str, shown: Sequence[Product], number: int, total: int, visited: set[str]
) -> Page:
    """Page ``number`` (from 1) of the results; it may be behind the last one and show nothing."""
    pieces = [*_instruction(instruction), _button("Back to Search")]
    pieces.append(Piece(f"Page {number} (Total results: {total})"))
    if number > 1:
        pieces.append(_button("< Prev"))
    pieces.append(_button("Next >"))
    for product in shown:
        pieces += [
            Piece(product.asin, "product", clicked=product.asin in visited),
            Piece(product.title),
            Piece(product.price_tag),
        ]
    return Page(tuple(pieces))


def item_page(
    instruction: str, product: Product, chosen: Mapping[str, str], *, show_attributes: bool
) -> Page:
    """A product with its options."""
    pieces = _top(instruction)
    for name, values in product.options.items():
        pieces.append(Piece(name))
        pieces += [Piece(value, "option", chosen.get(name) == value, name) for value in values]
    pieces += [
        Piece(product.title),
        Piece(f"Price: {product.price_tag}"),
        Piece(f"Rating: {_RATING}"),
    ]
    names = SUB_PAGES if show_attributes else SUB_PAGES[:-1]
    pieces += [_button(name.capitalize()) for name in names]
    pieces.append(_button("Buy Now"))
    return Page(tuple(pieces))


def sub_page(instruction: str, product: Product, name: str) -> Page:
    """One of `SUB_PAGES` of a product."""
    attributes = (
        *product.attributes,
        product.category,
        product.query,
        product.product_category,
    )
    texts = {
        "description": (product.description,),
        "features": product.bullets,
        "reviews": (),
        "attributes": attributes,
    }[name]
    return Page((*_top(instruction), *map(Piece, texts)))


def done_page(score: float) -> Page:
    """After the purchase."""
    return Page(
        (
            Piece("Thank you for shopping with us!"),
            Piece("Your score (min 0.0, max 1.0)"),
            Piece(str(score)),
        )
    )


def _button(text: str) -> Piece:
    return Piece(text, "button")


def _instruction(text: str) -> list[Piece]:
    return [Piece("Instruction:"), Piece(text)]


def _top(instruction: str) -> list[Piece]:
    return [*_instruction(instruction), _button("Back to Search"), _button("< Prev")]


def _marked(piece: Piece) -> str:
    if piece.role == "text":
        return piece.text
    kind = "clicked button" if piece.clicked else "button"
    before = {"button": "", "product": "\n", "option": "  "}[piece.role]
    return f"{before}[{kind}] {piece.text} [{kind}_]"
