"""Settings of WebShop."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_spear.config.base import NonNegativeInt, PositiveInt, Section
from megatron_spear.config.environments.base import EnvironmentSection
from megatron_spear.errors import ConfigError
from megatron_spear.types import PRODUCT_CATEGORIES, ProductCategory

_ALL = 1 << 40  # more goals than any file has


class ShopSection(Section):
    """The generated shop."""

    products: Annotated[int, Field(ge=20)] = 200
    """Products on sale; the five categories have the same share."""
    seed: NonNegativeInt = 0
    """Seed of the products."""


class WebshopSection(EnvironmentSection):
    """WebShop, played by the native engine."""

    type: Literal["webshop"] = "webshop"
    """Which environment."""
    max_turns: PositiveInt = 15
    """Turns after which an attempt is over (paper: 15)."""
    products: Path | None = None
    """The official ``items_shuffle.json`` or ``items_shuffle_1000.json``. None = a generated
    shop."""
    attributes: Path | None = None
    """The official ``items_ins_v2.json`` or ``items_ins_v2_1000.json``; needed with
    ``products``."""
    instructions: Path | None = None
    """The official ``items_human_ins.json``; needed with ``products`` for human goals."""
    num_products: PositiveInt | None = None
    """Rows of ``products`` on sale, the first ones; None = all."""
    goals: Literal["human", "synthetic"] = "human"
    """Goals with ``products``: written by people (``instructions``), or put together from
    ``attributes`` with every choice of options."""
    num_test_goals: PositiveInt = 500
    """Goals with ``products`` at the start of the official order that are evaluated on and never
    trained on (500 by convention)."""
    categories: tuple[ProductCategory, ...] = PRODUCT_CATEGORIES
    """Categories of the goals; goals of any other are left out."""
    shop: ShopSection = ShopSection()
    """The generated shop; read when ``products`` is None."""
    observation: Literal["text", "text_rich"] = "text"
    """``text``: the visible strings with [SEP] between them. ``text_rich``: a line each, with marks
    around what can be clicked and what has been."""
    show_attributes: bool = False
    """Whether a product has a page with its attributes."""
    nouns: Literal["words", "spacy"] = "words"
    """What finds the nouns of titles, for the reward's type factor: a word list, or spaCy with
    ``en_core_web_sm`` as in the official code (docs/webshop.md)."""
    prompt: Literal["compact", "official"] = "compact"
    """``compact``: the page only, the answer is the action. ``official``: the paper's prompt with
    admissible actions, <think> and <action> tags."""

    @property
    def task_kinds(self) -> tuple[str, ...]:
        """The categories, each once."""
        return tuple(dict.fromkeys(self.categories))

    def with_panel(self, source: str) -> Self:
        """All goals of an instructions file, or ``test``, the official split."""
        path = Path(source).expanduser()
        if path.is_file() and self.products is not None:
            changed = {"instructions": path, "goals": "human", "num_test_goals": _ALL}
            return self.model_copy(update=changed)
        if source == "test":
            return self
        raise ConfigError(
            f"--panel {source}: expected `test`, the first env.num_test_goals goals, or with "
            "env.products set a file like items_human_ins.json, of which all goals are played"
        )

    @model_validator(mode="after")
    def _files_fit(self) -> "WebshopSection":
        if not self.categories:
            raise ValueError(
                f"categories has nothing; expected some of {', '.join(PRODUCT_CATEGORIES)}"
            )
        if self.products is None:
            given = [n for n in ("attributes", "instructions", "num_products") if getattr(self, n)]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} without products; expected env.products, the path of "
                    "items_shuffle.json, or none of them for a generated shop"
                )
        elif self.attributes is None:
            raise ValueError("products without attributes; expected the path of items_ins_v2.json")
        elif self.goals == "human" and self.instructions is None:
            raise ValueError(
                "goals=human without instructions; expected the path of items_human_ins.json, or "
                "goals=synthetic"
            )
        return self
