"""WebShop as a text environment: one visit per reset, text in and text out."""

from collections.abc import Mapping
from typing import Any, Literal

from megatron_spear.envs.protocol import StepResult, TextEnvironment
from megatron_spear.envs.webshop.goal import Goal
from megatron_spear.envs.webshop.nouns import noun_finder
from megatron_spear.envs.webshop.pages import Page, done_page
from megatron_spear.envs.webshop.reward import judge
from megatron_spear.envs.webshop.session import Session
from megatron_spear.envs.webshop.shop import open_shop
from megatron_spear.errors import DataError, EnvironmentFault

Nouns = Literal["words", "spacy"]


class WebshopEnvironment(TextEnvironment):
    """Shops for the goal in ``options["goal"]``; the purchase ends it, its score is the reward.

    Args:
        products: path of ``items_shuffle*.json``; None = a generated shop.
        attributes: path of ``items_ins_v2*.json``; goes with ``products``.
        num_products: rows of ``products`` that are on sale; None = all. Size of a generated shop.
        seed: of a generated shop.
        observation: ``text`` or ``text_rich``.
        show_attributes: whether a product has a page with its attributes.
        nouns: what finds the nouns of titles for the reward.

    Options of `reset`:
        goal: the fields of a `Goal` as a plain dict (`Goal.to_fields`).
        admissible: put the possible actions into ``info["admissible"]``.

    ``info`` holds ``won`` (score 1.0), ``valid``, ``score``, ``task`` (the instruction), ``anchor``
    and, when asked for, ``admissible``; after a step also ``tool_calls``, the action as one call
    that succeeded if it was valid. The anchor is the observation with the chosen options, which the
    mode ``text`` does not show. There is no limit of steps.

    The shop is made once in a process and shared by its environments.
    """

    def __init__(
        self,
        *,
        products: str | None = None,
        attributes: str | None = None,
        num_products: int | None = 200,
        seed: int = 0,
        observation: Literal["text", "text_rich"] = "text",
        show_attributes: bool = False,
        nouns: Nouns = "words",
    ) -> None:
        self._shop = open_shop(products, attributes, num_products, seed)
        self._nouns = noun_finder(nouns)
        self._rich, self._show_attributes = observation == "text_rich", show_attributes
        self._session: Session | None = None
        self._lists_admissible = False

    def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Enter the shop; ``seed`` keys nothing but what the query ``<r>`` draws.

        Raises `DataError` for a goal that cannot be read.
        """
        values = options.get("goal")
        if not isinstance(values, Mapping):
            got = type(values).__name__
            raise DataError(f"options['goal'] is a {got}; expected a Goal's fields as a dict.")
        goal = Goal.from_fields(values)
        self._session = Session(self._shop, goal, seed, show_attributes=self._show_attributes)
        self._lists_admissible = bool(options.get("admissible", False))
        observation = self._text(self._session.page)
        return observation, self._info(self._session, observation, valid=True)

    def step(self, action: str) -> StepResult:
        """Apply one action; white space around it does not count."""
        session = self._session
        if session is None:
            raise EnvironmentFault(
                "step outside a visit: call reset before the first and after the last turn."
            )
        if session.buys(action):
            return self._buy(session, action)
        valid = session.act(action)
        observation = self._text(session.page)
        info = self._info(session, observation, valid=valid)
        info["tool_calls"] = [_call(action, valid)]
        return StepResult(observation, 0.0, False, False, info)

    def close(self) -> None:
        """Leave the shop."""
        self._session = None

    def _buy(self, session: Session, action: str) -> StepResult:
        product = session.product
        assert product is not None, "only a product's page has the button"
        found = judge(product, session.chosen, session.goal, self._nouns)
        observation = self._text(done_page(found.score))
        info: dict[str, Any] = {
            "won": found.won,
            "valid": True,
            "score": found.score,
            "task": session.goal.instruction,
            "anchor": observation,
            "tool_calls": [_call(action, True)],
        }
        if self._lists_admissible:
            info["admissible"] = []
        self._session = None
        return StepResult(observation, found.score, True, False, info)

    def _text(self, page: Page) -> str:
        return page.rich_text() if self._rich else page.text()

    def _info(self, session: Session, observation: str, *, valid: bool) -> dict[str, Any]:
        chosen = ", ".join(f"{name}: {value}" for name, value in sorted(session.chosen.items()))
        info: dict[str, Any] = {
            "won": False,
            "valid": valid,
            "score": 0.0,
            "task": session.goal.instruction,
            "anchor": f"{observation}\n[chosen: {chosen or 'nothing'}]",
        }
        if self._lists_admissible:
            info["admissible"] = session.admissible()
        return info


def _call(action: str, succeeded: bool) -> dict[str, Any]:
    return {"name": "act", "arguments": action.strip(), "succeeded": succeeded}
