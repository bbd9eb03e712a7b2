"""The words the player reads, made from the feedback grammar in `rules`."""

import re
from collections.abc import Iterable, Sequence

from megatron_spear.envs.alfworld.game import GameState
from megatron_spear.envs.alfworld.rules import FEEDBACK

_LIST = re.compile(r"\[\{.*?\}\]")
_NAME = re.compile(r"\{(\w+)\.name[^}]*\}")
_SYMBOL = re.compile(r"#([^#]+)#")
_CONDITION = re.compile(r"(\w+)\(")


def _form(symbol: str, index: int = 0) -> str:
    """A ``str.format`` text for a feedback rule: lists, names and symbols become fields.

    ``The {r.name} is open. In it, you see [{.. | ..}].`` gives ``The {r} is open. In it, you see
    {items}.``
    """
    text = _NAME.sub(r"{\1}", _LIST.sub("{items}", FEEDBACK[symbol][index][1]))
    return _SYMBOL.sub(lambda found: "{" + re.sub(r"\W", "_", found[1]) + "}", text)


ARRIVE = _form("GotoLocation.feedback")
OPEN = _form("OpenObject.feedback")
CLOSE = _form("CloseObject.feedback")
TAKE = _form("PickupObject.feedback")
MOVE = _form("PutObject.feedback")
CLEAN = _form("cleanObject.feedback")
HEAT = _form("heatObject.feedback")
COOL = _form("coolObject.feedback")
SLICE = _form("sliceObject.feedback")
TOGGLE = _form(
    "toggleObject.feedback"
)  # isToggled is set before the text is made: always "turn on"

_INTRO = _form("intro")
_CARRYING, _NOT_CARRYING = (_form("inventory.feedback", index) for index in range(2))
_IS_OPEN, _IS_CLOSED, _ON_IT = (_form("examineReceptacle.feedback", index) for index in range(3))
_FACING_AND_FLOOR, _MIDDLE = (_form("look.feedback", index) for index in range(2))
_FACING = _form("look-variations")
_NOTHING = _form("list_empty")
_SEPARATOR = _form("list_separator")
_LAST_SEPARATOR = _form("list_last_separator")
_EXAMINE_OBJECT = tuple(
    (tuple(_CONDITION.findall(condition)), _form("examineObject.feedback", index))
    for index, (condition, _) in enumerate(FEEDBACK["examineObject.feedback"])
)


def intro(state: GameState) -> str:
    """The first text of a game: a look around from outside, then the task."""
    return _INTRO.format(look_feedback=_look(state, list_all=True), task=state.game.task)


def look(state: GameState) -> str:
    """What ``look`` answers.

    Two oddities of the original are kept. Away from any receptacle, only the reset text lists the
    room; a later ``look`` says "you see nothing", because the rule then asks for receptacles at the
    agent's own location. "Next to it" lists an object once per receptacle here that it was taken
    from earlier.
    """
    return _look(state, list_all=False)


def receptacle(state: GameState, entity: str) -> str:
    """The receptacle and, unless it is closed, what it holds."""
    if not state.is_accessible(entity):
        return _IS_CLOSED.format(r=state.game.names[entity])
    form = _IS_OPEN if entity in state.game.openable else _ON_IT
    return form.format(r=state.game.names[entity], items=_things(state, state.contents[entity]))


def held_object(state: GameState, entity: str) -> str:
    """The object in hand: its state, or what it contains."""
    game, facts = state.game, state.facts
    for predicates, form in _EXAMINE_OBJECT:
        # "not_istoggled" is never a fact in TextWorld, so its rule never applies; here neither.
        if all(
            (name, entity) in facts or (name, entity) in game.static_facts for name in predicates
        ):
            items = _things(state, game.inside_object.get(entity, ()))
            return form.format(o=game.names[entity], items=items)
    raise AssertionError("the last rule of examineObject.feedback has no condition")


def inventory(state: GameState) -> str:
    """What the agent carries."""
    if state.held is None:
        return _NOT_CARRYING
    return _CARRYING.format(items=_things(state, (state.held,)))


def _look(state: GameState, list_all: bool) -> str:
    game = state.game
    here = game.receptacles_at.get(state.location, ())
    if not here:
        return _MIDDLE.format(list_appliances=_things(state, game.receptacles if list_all else ()))
    floor = sorted(
        (thing, place)
        for thing, place in state.taken
        if place in here and ("objectatlocation", thing, state.location) in state.facts
    )
    return _FACING_AND_FLOOR.format(
        look_variations=_FACING.format(items=_listed([game.names[place] for place in here])),
        list_objects_on_the_floor=_things(state, [thing for thing, _ in floor]),
    )


def _things(state: GameState, entities: Iterable[str]) -> str:
    names = state.game.names
    return _listed([f"a {names[entity]}" for entity in entities])


def _listed(items: Sequence[str]) -> str:
    if not items:
        return _NOTHING
    if len(items) == 1:
        return items[0]
    return _SEPARATOR.join(items[:-1]) + _LAST_SEPARATOR + items[-1]
