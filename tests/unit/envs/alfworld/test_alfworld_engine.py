"""Every action of the domain: its words, its effect, and when it is refused."""

import random
import re

import pytest

from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.rules import ACTIONS, HELP_TEXT
from megatron_spear.envs.alfworld.text import intro

NOTHING = ("Nothing happens.", False)


def play(state, *actions):
    """Apply actions that must all be possible; gives the last feedback."""
    feedback = ""
    for action in actions:
        assert action in admissible_actions(state), action
        feedback, valid = act(state, action)
        assert valid, action
    return feedback


def test_reset_text_lists_the_room_by_id(state):
    assert intro(state) == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. Looking quickly around you, you see a countertop 1, "
        "a drawer 2, a drawer 1, a fridge 1, a microwave 1, and a sinkbasin 1.\n\n"
        "Your task is to: put a clean mug in drawer."
    )


def test_look_away_from_receptacles_sees_nothing(state):
    assert play(state, "look") == (
        "You are in the middle of a room. Looking quickly around you, you see nothing."
    )


def test_look_names_all_receptacles_here(state):
    seen = play(state, "go to drawer 1", "look")
    assert seen == "You are facing the drawer 2, and drawer 1. Next to it, you see nothing."


def test_look_lists_what_was_taken_from_one_receptacle_and_put_in_its_neighbour(state):
    play(state, "go to drawer 2", "open drawer 2", "take mug 1 from drawer 2")
    seen = play(state, "move mug 1 to drawer 1", "look")
    assert seen == "You are facing the drawer 2, and drawer 1. Next to it, you see a mug 1."
    seen = play(state, "take mug 1 from drawer 1", "move mug 1 to drawer 2", "look")
    assert seen.endswith("Next to it, you see a mug 1.")


def test_look_does_not_list_what_was_taken_elsewhere(state):
    play(state, "go to drawer 2", "open drawer 2", "take mug 1 from drawer 2")
    seen = play(state, "go to countertop 1", "move mug 1 to countertop 1", "look")
    assert seen == "You are facing the countertop 1. Next to it, you see nothing."


def test_inventory_and_help(state):
    assert play(state, "inventory") == "You are not carrying anything."
    play(state, "go to countertop 1", "take plate 1 from countertop 1")
    assert play(state, "inventory") == "You are carrying: a plate 1."
    assert play(state, "help") == HELP_TEXT


def test_going_shows_what_lies_there(state):
    assert play(state, "go to countertop 1") == (
        "You arrive at countertop 1. On the countertop 1, you see a apple 2, a desklamp 1, "
        "a knife 1, a mug 2, a plate 1, and a spoon 1."
    )
    assert act(state, "go to countertop 1") == NOTHING
    play(state, "go to drawer 1")
    assert act(state, "go to drawer 2") == NOTHING, "the same place"


def test_open_and_close(state):
    assert play(state, "go to fridge 1") == "You arrive at fridge 1. The fridge 1 is closed."
    assert act(state, "close fridge 1") == NOTHING
    assert act(state, "take apple 1 from fridge 1") == NOTHING
    assert play(state, "examine fridge 1") == "The fridge 1 is closed."
    opened = play(state, "open fridge 1")
    assert opened == ("You open the fridge 1. The fridge 1 is open. In it, you see a apple 1.")
    assert act(state, "open fridge 1") == NOTHING
    assert play(state, "close fridge 1") == "You close the fridge 1."
    assert act(state, "open countertop 1") == NOTHING
    play(state, "go to countertop 1")
    assert act(state, "open countertop 1") == NOTHING


def test_take_and_move(state):
    play(state, "go to countertop 1")
    taken = play(state, "take mug 2 from countertop 1")
    assert taken == "You pick up the mug 2 from the countertop 1."
    assert act(state, "take apple 2 from countertop 1") == NOTHING, "the hand is full"
    play(state, "go to fridge 1")
    assert act(state, "move mug 2 to fridge 1") == NOTHING, "closed"
    moved = play(state, "open fridge 1", "move mug 2 to fridge 1")
    assert moved == "You move the mug 2 to the fridge 1."
    seen = play(state, "examine fridge 1")
    assert seen == "The fridge 1 is open. In it, you see a apple 1, and a mug 2."


def test_a_receptacle_takes_only_its_types(state):
    play(state, "go to countertop 1", "take knife 1 from countertop 1", "go to sinkbasin 1")
    assert act(state, "move knife 1 to sinkbasin 1") == NOTHING
    assert act(state, "clean knife 1 with sinkbasin 1") == NOTHING, "not cleanable"


def test_a_fixed_object_cannot_be_taken(state):
    play(state, "go to countertop 1")
    assert act(state, "take desklamp 1 from countertop 1") == NOTHING


def test_an_object_taken_from_one_of_two_places_stays_in_the_other(state):
    play(state, "go to drawer 1", "take spoon 1 from drawer 1", "go to countertop 1")
    assert act(state, "take spoon 1 from countertop 1") == NOTHING, "the hand is full"
    play(state, "move spoon 1 to countertop 1", "take spoon 1 from countertop 1")
    play(state, "go to drawer 1")
    assert play(state, "examine drawer 1") == "On the drawer 1, you see nothing."


def test_hot_and_cold_replace_each_other(state):
    play(state, "go to countertop 1", "take apple 2 from countertop 1", "go to microwave 1")
    heated = play(state, "heat apple 2 with microwave 1")
    assert heated == "You heat the apple 2 using the microwave 1."
    assert play(state, "examine apple 2") == "This is a hot apple 2."
    cooled = play(state, "go to fridge 1", "cool apple 2 with fridge 1")
    assert cooled == "You cool the apple 2 using the fridge 1."
    assert play(state, "examine apple 2") == "This is a cold apple 2."
    cleaned = play(state, "go to sinkbasin 1", "clean apple 2 with sinkbasin 1")
    assert cleaned == "You clean the apple 2 using the sinkbasin 1."
    assert play(state, "examine apple 2") == "This is a cool and clean apple 2."
    play(state, "go to microwave 1", "heat apple 2 with microwave 1")
    assert play(state, "examine apple 2") == "This is a hot and clean apple 2."


def test_slice_then_examine(state):
    play(state, "go to countertop 1", "take knife 1 from countertop 1")
    sliced = play(state, "slice apple 2 with knife 1")
    assert sliced == "You sliced the apple 2 with the knife 1."
    assert act(state, "slice mug 2 with knife 1") == NOTHING
    assert act(state, "slice apple 1 with knife 1") == NOTHING, "elsewhere"
    assert act(state, "slice apple 2 with spoon 1") == NOTHING, "not in hand"
    play(state, "move knife 1 to countertop 1", "take apple 2 from countertop 1")
    assert play(state, "examine apple 2") == "This is a sliced apple 2."
    play(state, "go to sinkbasin 1", "clean apple 2 with sinkbasin 1")
    assert play(state, "examine apple 2") == "This is a clean sliced apple 2."
    play(state, "go to microwave 1", "heat apple 2 with microwave 1")
    assert play(state, "examine apple 2") == "This is a hot and clean sliced apple 2."


def test_a_closed_receptacle_does_not_stop_slicing(state):
    play(state, "go to countertop 1", "take knife 1 from countertop 1", "go to fridge 1")
    assert play(state, "slice apple 1 with knife 1")


def test_use_always_turns_on(state):
    play(state, "go to countertop 1")
    assert play(state, "use desklamp 1") == "You turn on the desklamp 1."
    assert play(state, "use desklamp 1") == "You turn on the desklamp 1."
    assert act(state, "use mug 2") == NOTHING
    play(state, "use spoon 1", "take spoon 1 from countertop 1")
    assert play(state, "examine spoon 1") == "This spoon 1 is on."
    play(state, "go to fridge 1")
    assert act(state, "use desklamp 1") == NOTHING


def test_examine_needs_the_object_in_hand(state):
    play(state, "go to countertop 1")
    assert act(state, "examine mug 2") == NOTHING
    play(state, "take plate 1 from countertop 1")
    assert play(state, "examine plate 1") == ("This is a normal plate 1. In it, you see a spoon 1.")
    assert act(state, "examine fridge 1") == NOTHING
    play(state, "move plate 1 to countertop 1", "take mug 2 from countertop 1")
    assert play(state, "examine mug 2") == "There's nothing special about mug 2."


def test_the_goal_is_reached_by_the_plan_and_not_before(state, game_file):
    for action in game_file.walkthrough:
        assert not state.won
        play(state, action)
    assert state.won
    play(state, "take mug 2 from drawer 1")
    assert not state.won


@pytest.mark.parametrize(
    "command",
    [
        *("", " ", "LOOK", "Look", "look around", "go", "go to", "go countertop 1", "go to desk"),
        *("go to  countertop 1", "GO TO countertop 1", "go to mug 2", "take", "take mug 2"),
        *("take mug 2 from", "take mug 2  from countertop 1", "take from countertop 1", "put"),
        *("put mug 2 in/on drawer 1", "use", "slice", "slice with", "slice apple 2 with"),
        *("clean mug 2", "examine", "dance", "\N{SNOWMAN}", "\ud800", "look\x00", "go to\nlook"),
    ],
)
def test_anything_else_changes_nothing(state, command):
    play(state, "go to drawer 1")
    before = state.copy()
    assert act(state, command) == NOTHING
    assert state.facts == before.facts


def test_white_space_around_a_command_does_not_count(state):
    assert act(state, "\n  go to fridge 1\t ").valid


def test_every_command_fits_a_template_and_every_template_is_used(state):
    patterns = {}
    for name, action in ACTIONS.items():
        template = re.sub(r"\[.*\]", "{r}", action.template)
        patterns[name] = re.compile(re.sub(r"\\\{\w+\\\}", "[a-z]+ [0-9]+", re.escape(template)))
    used = set()
    chance = random.Random(0)
    for _ in range(600):
        actions = admissible_actions(state)
        for command in actions:
            fits = [name for name, pattern in patterns.items() if pattern.fullmatch(command)]
            assert fits, command
            used.update(fits)
        act(state, chance.choice([a for a in actions if not a.startswith("go")] + actions))
    assert used == set(ACTIONS)


@pytest.mark.parametrize("seed", range(12))
def test_a_command_is_valid_exactly_when_it_is_listed(state, seed):
    """Over random play, for all commands that two random names and the verbs can form."""
    names = [name for name in state.game.names.values() if name[-1].isdigit()]
    chance = random.Random(seed)
    for _ in range(25):
        listed = admissible_actions(state)
        assert listed == sorted(set(listed))
        one, two = chance.choices(names, k=2)
        tried = [f"{verb} {one}" for verb in ("go to", "open", "close", "examine", "use")]
        tried += [f"take {one} from {two}", f"move {one} to {two}"]
        tried += [f"{verb} {one} with {two}" for verb in ("clean", "heat", "cool", "slice")]
        for command in [*tried, *listed]:
            twin = state.copy()
            assert act(twin, command).valid is (command in listed), command
            if command not in listed:
                assert twin.facts == state.facts
        act(state, chance.choice([a for a in listed if not a.startswith("go")] + listed))
