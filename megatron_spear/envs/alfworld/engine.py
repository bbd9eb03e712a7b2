"""Play: apply one command to a state, and list the commands that would do something.

======================  ===================================================  ====================
command                 possible when                                        changes
======================  ===================================================  ====================
look, inventory, help   always
go to R                 R is elsewhere                                       the location
examine R | O           R is here | O is in hand
open R, close R         R is here, has a door, is closed | open              opened
take O from R           R is here and not closed, O is in R and can be       O's places, the hand
                        lifted, the hand is empty
move O to R             R is here and not closed, takes O's type, O in hand  O's places, the hand
clean | heat | cool O   R is a sink | microwave | fridge here, open or not,  isClean | isHot |
with R                  O is in hand and can be cleaned | heated | cooled    isCool
use O                   O has a switch, lies in a receptacle here, open or   isToggled, isOn
                        not
slice O with K          K in hand is a knife, O here can be sliced           isSliced
======================  ===================================================  ====================

As in TextWorld, a command counts only when it is, stripped of surrounding white space, exactly one
of the possible ones; anything else is answered with "Nothing happens." and changes nothing.
"""

from bisect import insort
from collections.abc import Callable
from typing import NamedTuple

from megatron_spear.envs.alfworld import text
from megatron_spear.envs.alfworld.game import Game, GameState
from megatron_spear.envs.alfworld.rules import (
    CLEANER_TYPES,
    COOLER_TYPES,
    HEATER_TYPES,
    HELP_TEXT,
    INVALID_TEXT,
    KNIFE_TYPES,
)


class Reply(NamedTuple):
    """The answer to a command; ``valid`` is False when nothing happened."""

    feedback: str
    valid: bool


def act(state: GameState, command: str) -> Reply:
    """Apply ``command`` to ``state`` in place and answer as TextWorld does, odd text included."""
    verb, _, rest = command.strip().partition(" ")
    handler = _HANDLERS.get(verb)
    feedback = handler(state, rest) if handler is not None else None
    return Reply(INVALID_TEXT, False) if feedback is None else Reply(feedback, True)


def admissible_actions(state: GameState) -> list[str]:
    """Every command that would not be answered with "Nothing happens.", sorted, each once."""
    game, names = state.game, state.game.names
    here = game.receptacles_at.get(state.location, ())
    actions = ["help", "inventory", "look"]
    actions.extend(f"go to {names[place]}" for place in game.receptacles if place not in here)
    for place in here:
        name = names[place]
        actions.append(f"examine {name}")
        if place in game.openable:
            verb = "close" if ("opened", place) in state.facts else "open"
            actions.append(f"{verb} {name}")
        contents = state.contents[place]
        actions.extend(f"use {names[thing]}" for thing in contents if thing in game.toggleable)
        if state.held is not None:
            actions.extend(_with_held(state, state.held, place))
        elif state.is_accessible(place):
            movable = (names[thing] for thing in contents if thing in game.pickupable)
            actions.extend(f"take {thing} from {name}" for thing in movable)
    if state.held is not None:
        actions.append(f"examine {names[state.held]}")
        if _is_knife(game, state.held):
            knife = names[state.held]
            sliceable = (thing for thing in game.sliceable if _is_here(state, thing))
            actions.extend(f"slice {names[thing]} with {knife}" for thing in sliceable)
    return sorted(set(actions))


def _with_held(state: GameState, held: str, place: str) -> list[str]:
    thing, name = state.game.names[held], state.game.names[place]
    actions = []
    if _can_move(state, held, place):
        actions.append(f"move {thing} to {name}")
    if _can_treat(state.game, held, place, "clean"):
        actions.append(f"clean {thing} with {name}")
    if _can_treat(state.game, held, place, "heat"):
        actions.append(f"heat {thing} with {name}")
    if _can_treat(state.game, held, place, "cool"):
        actions.append(f"cool {thing} with {name}")
    return actions


def _look(state: GameState, rest: str) -> str | None:
    return None if rest else text.look(state)


def _inventory(state: GameState, rest: str) -> str | None:
    return None if rest else text.inventory(state)


def _help(state: GameState, rest: str) -> str | None:
    return None if rest else HELP_TEXT


def _go(state: GameState, rest: str) -> str | None:
    place = state.game.id_of.get(rest[3:]) if rest.startswith("to ") else None
    location = state.game.location_of.get(place) if place is not None else None
    if place is None or location is None or location == state.location:
        return None
    state.facts.discard(("atlocation", state.game.agent, state.location))
    state.facts.add(("atlocation", state.game.agent, location))
    state.location = location
    return text.ARRIVE.format(
        r=state.game.names[place], examineReceptacle_feedback=text.receptacle(state, place)
    )


def _examine(state: GameState, rest: str) -> str | None:
    place = _place_here(state, rest)
    if place is not None:
        return text.receptacle(state, place)
    if state.held is not None and state.game.names[state.held] == rest:
        return text.held_object(state, state.held)
    return None


def _open(state: GameState, rest: str) -> str | None:
    place = _place_here(state, rest)
    if place is None or state.is_accessible(place):
        return None
    state.facts.add(("opened", place))
    return text.OPEN.format(r=rest, examineReceptacle_feedback=text.receptacle(state, place))


def _close(state: GameState, rest: str) -> str | None:
    place = _place_here(state, rest)
    if place is None or place not in state.game.openable or ("opened", place) not in state.facts:
        return None
    state.facts.discard(("opened", place))
    return text.CLOSE.format(r=rest)


def _take(state: GameState, rest: str) -> str | None:
    thing, place = _thing_and_place(state, rest, " from ")
    if thing is None or place is None or state.held is not None:
        return None
    in_place = thing in state.contents[place] and thing in state.game.pickupable
    if not in_place or not state.is_accessible(place):
        return None
    state.contents[place] = tuple(other for other in state.contents[place] if other != thing)
    state.held = thing
    state.taken.add((thing, place))
    state.facts -= {("inreceptacle", thing, place), ("objectatlocation", thing, state.location)}
    state.facts |= {("holds", state.game.agent, thing), ("holdsany", state.game.agent)}
    return text.TAKE.format(o=state.game.names[thing], r=state.game.names[place])


def _move(state: GameState, rest: str) -> str | None:
    thing, place = _thing_and_place(state, rest, " to ")
    if thing is None or place is None or not _can_move(state, thing, place):
        return None
    if thing not in state.contents[place]:
        contents = list(state.contents[place])
        insort(contents, thing)
        state.contents[place] = tuple(contents)
    state.held = None
    state.taken.discard((thing, place))
    state.facts -= {("holds", state.game.agent, thing), ("holdsany", state.game.agent)}
    state.facts |= {("inreceptacle", thing, place), ("objectatlocation", thing, state.location)}
    return text.MOVE.format(o=state.game.names[thing], r=state.game.names[place])


def _clean(state: GameState, rest: str) -> str | None:
    return _treat(state, rest, "clean", text.CLEAN, "isclean", None)


def _heat(state: GameState, rest: str) -> str | None:
    return _treat(state, rest, "heat", text.HEAT, "ishot", "iscool")


def _cool(state: GameState, rest: str) -> str | None:
    return _treat(state, rest, "cool", text.COOL, "iscool", "ishot")


def _treat(
    state: GameState, rest: str, verb: str, form: str, gained: str, lost: str | None
) -> str | None:
    thing, place = _thing_and_place(state, rest, " with ")
    if thing is None or thing != state.held or place is None:
        return None
    if not _can_treat(state.game, thing, place, verb):
        return None
    state.facts.add((gained, thing))
    if lost is not None:
        state.facts.discard((lost, thing))
    return form.format(o=state.game.names[thing], r=state.game.names[place])


def _use(state: GameState, rest: str) -> str | None:
    game = state.game
    thing = game.id_of.get(rest)
    here = game.receptacles_at.get(state.location, ())
    if thing not in game.toggleable or not any(thing in state.contents[place] for place in here):
        return None
    state.facts.add(("istoggled", thing))
    state.facts ^= {("ison", thing)}
    return text.TOGGLE.format(o=rest)


def _slice(state: GameState, rest: str) -> str | None:
    game = state.game
    name, _, knife = rest.partition(" with ")
    thing = game.id_of.get(name)
    if state.held is None or game.names[state.held] != knife or not _is_knife(game, state.held):
        return None
    if thing is None or thing not in game.sliceable or not _is_here(state, thing):
        return None
    state.facts.add(("issliced", thing))
    return text.SLICE.format(co=name, ko=knife)


def _place_here(state: GameState, name: str) -> str | None:
    place = state.game.id_of.get(name)
    return place if place in state.game.receptacles_at.get(state.location, ()) else None


def _thing_and_place(state: GameState, rest: str, joiner: str) -> tuple[str | None, str | None]:
    thing, _, place = rest.partition(joiner)
    return state.game.id_of.get(thing), _place_here(state, place)


def _is_here(state: GameState, thing: str) -> bool:
    return ("objectatlocation", thing, state.location) in state.facts


def _is_knife(game: Game, held: str) -> bool:
    return not KNIFE_TYPES.isdisjoint(game.types_of.get(held, ()))


def _can_move(state: GameState, thing: str, place: str) -> bool:
    if thing != state.held or not state.is_accessible(place):
        return False
    accepted = state.game.accepted_types.get(place, frozenset())
    return not accepted.isdisjoint(state.game.types_of.get(thing, ()))


def _can_treat(game: Game, thing: str, place: str, verb: str) -> bool:
    if verb == "clean":
        things, kinds = game.cleanable, CLEANER_TYPES
    elif verb == "heat":
        things, kinds = game.heatable, HEATER_TYPES
    else:
        things, kinds = game.coolable, COOLER_TYPES
    return thing in things and not kinds.isdisjoint(game.receptacle_types_of.get(place, ()))


_HANDLERS: dict[str, Callable[[GameState, str], str | None]] = {
    "look": _look,
    "inventory": _inventory,
    "help": _help,
    "go": _go,
    "examine": _examine,
    "open": _open,
    "close": _close,
    "take": _take,
    "move": _move,
    "clean": _clean,
    "heat": _heat,
    "cool": _cool,
    "use": _use,
    "slice": _slice,
}
