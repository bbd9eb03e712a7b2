"""WebShop for the trainer: goals as prompts, the environment, its views and demonstrations."""

import functools
import hashlib
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_spear.config.environments.webshop import WebshopSection
from megatron_spear.config.schema import SftSection
from megatron_spear.data.prompts import FreshPrompts, PoolPrompts, PromptSource
from megatron_spear.envs.demonstration import Demonstration
from megatron_spear.envs.family import EnvironmentFamily, Panel, Vocabulary
from megatron_spear.envs.views import AgentView
from megatron_spear.envs.webshop.generator import generate_goal, generate_products
from megatron_spear.envs.webshop.goal import Goal
from megatron_spear.envs.webshop.prompts import webshop_view
from megatron_spear.envs.webshop.sources import (
    file_sha256,
    load_human_goals,
    load_products,
    load_synthetic_goals,
)
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.types import Prompt

_MAX_TRIES = 50
_NEEDED = ("bm25s", "Stemmer", "rapidfuzz")


class WebshopFamily(EnvironmentFamily):
    """Shopping: goals of the official files epoch by epoch, or generated ones, fresh for each
    step.

    Raises ConfigError where the packages of the extra ``webshop`` are missing.
    """

    factory = "megatron_spear.envs.webshop.environment:WebshopEnvironment"

    def __init__(self, section: WebshopSection) -> None:
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"env.type=webshop needs {', '.join(missing)}, not installed here; pip install "
                "'megatron-spear[webshop]'"
            )
        self._section = section
        self._kinds = tuple(dict.fromkeys(section.categories))

    @property
    def factory_options(self) -> Mapping[str, Any]:
        """The shop and how it is shown."""
        env = self._section
        return {
            **self._shop_options(),
            "observation": env.observation,
            "show_attributes": env.show_attributes,
            "nouns": env.nouns,
        }

    def view(self) -> AgentView:
        """The view of ``env.prompt``."""
        return webshop_view(self._section.prompt)

    def training(self, order_seed: int, made_seed: int) -> PromptSource:
        """The training goals, or fresh ones."""
        kinds = self._kinds
        if self._section.products is not None:
            return _pool(_of_kinds(_split(self._section)[1], kinds), order_seed)
        return self._fresh(made_seed, kinds)

    def training_by_kind(self, order_seed: int, made_seed: int) -> dict[str, PromptSource]:
        """By category, in the order of the setting."""
        kinds = self._kinds
        if self._section.products is None:
            return {kind: self._fresh(f"{made_seed}/{kind}", [kind]) for kind in kinds}
        goals = {kind: _of_kinds(_split(self._section)[1], [kind]) for kind in kinds}
        return {kind: _pool(own, order_seed) for kind, own in goals.items() if own}

    def panel(self, size: int | None, made_seed: int) -> Panel:
        """Generated goals that are kept out of training, or the first of the test split (None = all
        of it)."""
        kinds = self._kinds
        if self._section.products is None:
            if size is None:
                raise ConfigError(
                    "evaluation.games=null takes the whole test split, and without env.products "
                    "goals are generated without end; give a number, or set env.products"
                )
            goals = [self._goal(made_seed, kinds, index, held_out=True) for index in range(size)]
        else:
            goals = _of_kinds(_split(self._section)[0], kinds)[:size]
        if len(goals) < (size or 1):
            raise DataError(
                f"evaluation.games: got {size}, but the test split has only {len(goals)} goals of "
                "env.categories; lower evaluation.games or raise env.num_test_goals"
            )
        digest = hashlib.sha256()
        for goal in goals:
            digest.update(json.dumps(goal.to_fields()).encode())
        return Panel(tuple(map(goal_prompt, goals)), digest.hexdigest())

    def demonstration(self, section: SftSection, made_seed: int, index: int) -> Demonstration:
        """A goal as a scripted shopper reaches it, with slips; loaded goals are drawn."""
        from megatron_spear.envs.webshop.demonstrations import demonstrate
        from megatron_spear.envs.webshop.nouns import noun_finder
        from megatron_spear.envs.webshop.shop import open_shop

        env, rng = self._section, random.Random(f"sft/{section.seed}/{index}")
        shop = open_shop(**self._shop_options())
        for attempt in range(_MAX_TRIES):
            if env.products is None:
                number = index + attempt * 1_000_003
                goal = self._goal(made_seed, self._kinds, number, held_out=False)
            else:
                goal = rng.choice(_of_kinds(_split(env)[1], self._kinds))
            played = demonstrate(
                shop,
                goal,
                rng,
                noun_finder(env.nouns),
                explore=section.explore,
                noise=section.noise,
                max_turns=env.max_turns,
                admissible=self.view().needs_admissible,
                rich=env.observation == "text_rich",
                show_attributes=env.show_attributes,
            )
            if played is not None:
                return replace(played, prompt=goal_prompt(goal))
        raise DataError(
            f"sft: got no demonstration within env.max_turns={env.max_turns} for {_MAX_TRIES} "
            "goals; raise env.max_turns or lower sft.explore and sft.noise"
        )

    def vocabulary(self) -> Vocabulary:
        """The generated shop's closed word list. Raises ConfigError for loaded products."""
        from megatron_spear.envs.webshop.vocabulary import webshop_phrases, webshop_words

        if self._section.products is not None:
            raise ConfigError(
                "a tiny model's tokenizer knows the words of a generated shop alone; set "
                "model.path, or env.products=null"
            )
        products = generate_products(self._section.shop.seed, self._section.shop.products)
        return Vocabulary(webshop_words(products), webshop_phrases(products))

    def contents(self) -> dict[str, str]:
        """Of the official files, where they are loaded."""
        env = self._section
        files = {name: getattr(env, name) for name in ("products", "attributes", "instructions")}
        return {name: file_sha256(path) for name, path in files.items() if path is not None}

    def _shop_options(self) -> dict[str, Any]:
        """Arguments of `shop.open_shop`."""
        env = self._section
        if env.products is None:
            return {"num_products": env.shop.products, "seed": env.shop.seed}
        return {
            "products": str(env.products),
            "attributes": str(env.attributes),
            "num_products": env.num_products,
        }

    def _goal(self, seed: int | str, kinds: Sequence[str], index: int, *, held_out: bool) -> Goal:
        """A generated goal; different ``seed``s give different rows of them."""
        shop = self._section.shop
        products = generate_products(shop.seed, shop.products)
        return generate_goal(products, kinds, seed, index, held_out=held_out)

    def _fresh(self, seed: int | str, kinds: Sequence[str]) -> PromptSource:
        return FreshPrompts(lambda i: goal_prompt(self._goal(seed, kinds, i, held_out=False)))


def goal_prompt(goal: Goal) -> Prompt:
    """One goal as a prompt; its metadata are the environment's reset options."""
    return Prompt(
        prompt_id=goal.id, env="webshop", kind=goal.category, metadata={"goal": goal.to_fields()}
    )


@functools.lru_cache(maxsize=1)
def _split(section: WebshopSection) -> tuple[list[Goal], list[Goal]]:
    """(Goals of the official files to evaluate on, goals to train on), read once in a process."""
    assert section.products is not None and section.attributes is not None, "both or none"
    products = load_products(section.products, section.attributes, section.num_products)
    if section.goals == "synthetic":
        goals = load_synthetic_goals(products, section.attributes)
    else:
        assert section.instructions is not None, "the settings have it for human goals"
        goals = load_human_goals(products, section.instructions)
    count = section.num_test_goals
    return goals[:count], goals[count:]


def _of_kinds(goals: Sequence[Goal], kinds: Sequence[str]) -> list[Goal]:
    return [goal for goal in goals if goal.category in kinds]


def _pool(goals: Sequence[Goal], order_seed: int) -> PromptSource:
    if not goals:
        raise DataError(
            "env.products: no goal of env.categories is left to train on; lower "
            "env.num_test_goals, name more categories, or give more products"
        )
    return PoolPrompts([goal_prompt(goal) for goal in goals], order_seed)
