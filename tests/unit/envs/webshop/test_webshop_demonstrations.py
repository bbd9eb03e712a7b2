"""Demonstrations reach the goal in the environment, with slips that change nothing there."""

import random

import pytest
from webshop_cases import LAMP, goal, make_shop, row

from megatron_spear.envs.webshop.demonstrations import (
    MAX_EXPLORE,
    MAX_SLIPS,
    demonstrate,
    options_for,
    search_words,
)
from megatron_spear.envs.webshop.environment import WebshopEnvironment
from megatron_spear.envs.webshop.generator import generate_goal
from megatron_spear.envs.webshop.nouns import word_nouns
from megatron_spear.envs.webshop.shop import open_shop
from megatron_spear.types import PRODUCT_CATEGORIES

SHOP = open_shop(num_products=200, seed=0)
LONG = 40


def goals(count):
    return [
        generate_goal(SHOP.products, PRODUCT_CATEGORIES, 5, i, held_out=False) for i in range(count)
    ]


def play(wanted, seed=0, **changes):
    settings = {"explore": 0.0, "noise": 0.0, "max_turns": LONG} | changes
    shop = settings.pop("shop", SHOP)
    return demonstrate(shop, wanted, random.Random(seed), word_nouns, **settings)


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("i need a red shirt in size small, and price lower than 40.00 dollars", "red shirt"),
        ("i am looking for a slim, quick drying shirt", "slim quick drying shirt"),
        ("Find me some tea", "tea"),
        ("in need of a lamp", "in need of a lamp"),
        ("i want a pack in blue", "pack in blue"),  # too little before it
        ("looking for a", "a"),
        ("i need [a] lamp]", "lamp"),
        ("i want a blue lamp, and price lower than mine", "blue lamp"),
        ("x" * 5, "xxxxx"),
    ],
)
def test_what_is_searched_for(instruction, words):
    assert search_words(instruction) == words


def test_options_in_the_order_of_the_goal():
    lamp = make_shop().by_asin[LAMP]
    wanted = goal(options=("large", "navy blue"))
    assert list(options_for(lamp, wanted).items()) == [("size", "large"), ("color", "navy blue")]
    named = goal(options=("color: black | gold", "size: small"), named=True)
    assert options_for(lamp, named) == {"color": "black | gold", "size": "small"}
    assert options_for(lamp, goal(options=("huge",))) == {}


@pytest.mark.parametrize(
    ("explore", "noise", "rich"), [(0.0, 0.0, False), (2.0, 0.3, False), (1.0, 0.2, True)]
)
def test_replayed_in_the_environment_they_win(explore, noise, rich):
    environment = WebshopEnvironment(observation="text_rich" if rich else "text")
    for number, wanted in enumerate(goals(40)):
        played = play(wanted, number, explore=explore, noise=noise, admissible=True, rich=rich)
        options = {"goal": wanted.to_fields(), "admissible": True}
        observation, info = environment.reset(seed=0, options=options)
        assert played is not None
        for turn in played.turns:
            assert turn.observation == observation
            assert turn.info == {"task": info["task"], "admissible": info["admissible"]}
            result = environment.step(turn.action)
            assert result.info["valid"] is turn.trained, turn
            observation, info = result.observation, result.info
        assert info["won"]
        assert played.turns[-1].action == "click[buy now]"


def test_without_noise_or_patience_it_goes_straight():
    for wanted in goals(40):
        actions = [turn.action for turn in play(wanted).turns]
        assert actions[0] == f"search[{search_words(wanted.instruction)}]"
        clicks = [action for action in actions[1:] if action != "click[next >]"]
        assert clicks[1:] == [*(f"click[{value}]" for value in wanted.options), "click[buy now]"]


def test_patience_opens_products_that_lack_an_option():
    returns = [
        sum(turn.action == "click[< prev]" for turn in play(wanted, i, explore=50.0).turns)
        for i, wanted in enumerate(goals(120))
    ]
    assert 5 < sum(map(bool, returns)) < 60
    assert max(returns) <= MAX_EXPLORE


def test_slips_are_not_trained_on_and_end():
    played = [play(wanted, i, noise=0.9) for i, wanted in enumerate(goals(20))]
    turns = [turn for demonstration in played for turn in demonstration.turns]
    assert sum(not turn.trained for turn in turns) > len(turns) // 2
    for demonstration in played:
        run = 0
        for turn in demonstration.turns:
            run = 0 if turn.trained else run + 1
            assert run <= MAX_SLIPS


def test_none_within_too_few_turns_and_none_for_what_is_not_there():
    assert play(goals(1)[0], max_turns=2) is None
    assert play(goal(attributes=("made of cheese",)), shop=make_shop()) is None
    assert play(goal(instruction="i need a bicycle"), shop=make_shop()) is None


@pytest.mark.parametrize("instruction", ["", ",", "x " * 5000])
def test_an_instruction_that_cannot_be_searched_for(instruction):
    wanted = goal(instruction=instruction)
    assert play(wanted, shop=make_shop(), noise=0.5, max_turns=9) is None


@pytest.mark.parametrize(
    ("options", "chosen", "won"),
    [
        ({"kind": [{"value": "Navy [blue]"}]}, ("navy [blue]",), False),  # no action says it
        ({"kind": [{"value": "Reviews"}]}, ("reviews",), False),  # a button's name
        ({"a": [{"value": "one"}], "b": [{"value": "one"}]}, ("one",), True),
    ],
)
def test_options_that_are_hard_to_click(options, chosen, won):
    known = {"B1": {"attributes": ["energy saving"]}}
    shop = make_shop([row("B1", "Brass Desk Lamp", customization_options=options)], known)
    played = play(goal(options=chosen), shop=shop)
    assert (played is not None) is won


def test_a_hand_made_goal():
    actions = [turn.action for turn in play(goal(), shop=make_shop()).turns]
    assert actions == [
        "search[energy saving lamp]",
        f"click[{LAMP}]",
        "click[navy blue]",
        "click[buy now]",
    ]


def test_the_seed_is_all_there_is():
    wanted = goals(1)[0]
    assert play(wanted, 3, explore=2.0, noise=0.3) == play(wanted, 3, explore=2.0, noise=0.3)
