"""What a purchase is worth (WebShop, arXiv 2207.01206, equations 1 and 2, as released).

    reward = r_type * (attribute hits + option hits + [price <= limit]) / (#attr + #opt + 1)

with every hit a fuzzy match. 1.0 means success.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rapidfuzz.fuzz import token_set_ratio
from rapidfuzz.utils import default_process

from megatron_spear.envs.webshop.goal import Goal
from megatron_spear.envs.webshop.product import Product

Nouns = Callable[[str], list[str]]
"""The nouns of a title, lower-cased, repeated ones as often as they occur."""

_MATCH = 85
_LATIN_1 = dict.fromkeys(range(128, 256))

# Names that stand for a whole family of colours: "navy blue" is blue. The first in this order that
# occurs in a text, also inside a word, is what the text is compared as.
_COLOUR_NAMES = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan "
    "taupe teal tiger turquoise violet walnut wheat white wine yellow"
)
_COLOURS = tuple(_COLOUR_NAMES.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A reward in parts.

    Example: type 1, one of two attributes, one of one option, price kept: score 0.75.
    """

    score: float
    type_factor: float
    attribute_hits: int
    option_hits: int
    price_hit: bool

    @property
    def won(self) -> bool:
        """Whether everything that was asked for was bought."""
        return self.score == 1.0


def judge(product: Product, chosen: Mapping[str, str], goal: Goal, nouns: Nouns) -> Judgement:
    """The reward for buying ``product`` with the ``chosen`` value of each option."""
    attributes = attribute_hits(product, goal.attributes)
    options = option_hits(chosen.values(), goal)
    price_hit = product.price <= goal.price_upper
    factor = type_factor(product, goal, nouns)
    asked = len(goal.attributes) + len(goal.options) + 1
    return Judgement(
        score=factor * ((attributes + options + price_hit) / asked),
        type_factor=factor,
        attribute_hits=attributes,
        option_hits=options,
        price_hit=price_hit,
    )


def type_factor(product: Product, goal: Goal, nouns: Nouns) -> float:
    """1.0, 0.5, 0.1 or 0.0: whether it is the kind of product that was asked for.

    ``overlap`` is the share of the goal title's nouns that the product's title has too (0.2 where
    the goal has none). 0.0 without overlap and 0.1 below 0.1, whatever else fits; else 1.0, but
    0.5 where neither the query nor two parts of the category path are the same and the overlap is
    at most 0.2.
    """
    wanted = nouns(goal.name)
    overlap = len(set(nouns(product.title)) & set(wanted)) / len(wanted) if wanted else 0.2
    if overlap == 0.0:
        return 0.0
    if overlap < 0.1:
        return 0.1
    shared = _path(product.product_category) & _path(goal.product_category)
    fits = product.query == goal.query or len(shared) >= 2 or overlap > 0.2
    return 1.0 if fits else 0.5


def attribute_hits(product: Product, wanted: Iterable[str]) -> int:
    """How many attributes match one of the product's, or occur in its texts."""
    texts = (product.title.lower(), " ".join(product.bullets).lower(), product.description.lower())
    return sum(
        any(_similar(own, attribute) for own in product.attributes)
        or any(attribute in text for text in texts)
        for attribute in wanted
    )


def option_hits(chosen: Iterable[str], goal: Goal) -> int:
    """How many of the goal's options one of the chosen values matches."""
    values = [first_colour(value) for value in chosen]
    targets = [_named_target(o) if goal.named else first_colour(o) for o in goal.options]
    return sum(any(_similar(value, target) for value in values) for target in targets)


def first_colour(text: str) -> str:
    """The colour family that occurs in a text, or the text. Example: ``navy blue`` is ``blue``."""
    return next((colour for colour in _COLOURS if colour in text), text)


def _named_target(option: str) -> str:
    """A synthetic goal's ``name: value`` is a colour only where one of the two is nothing else."""
    pair = option.split(": ", 1)
    return next((colour for colour in _COLOURS if colour in pair), " ".join(pair))


def _path(category: str) -> set[str]:
    return {part.strip() for part in category.split("›")}


def _similar(one: str, other: str) -> bool:
    """More than 85 of 100, rounded, over words in lower case without signs and Latin-1 letters."""
    ratio = token_set_ratio(
        default_process(one.translate(_LATIN_1)), default_process(other.translate(_LATIN_1))
    )
    return round(ratio) > _MATCH
