"""Demonstrations for the warm start: play as a policy should, with slips to recover from.

The player acts on what it has read: it searches the places it has not looked into, in the order in
which the room names them, and goes on as soon as the wanted object is in sight. Only when its
patience ends it gets a hint. The order is a rule that can be learned; a drawn one is a guess.
"""

import contextlib
import random
import re
from collections.abc import Callable, Sequence

from megatron_spear.envs.alfworld.engine import act, admissible_actions
from megatron_spear.envs.alfworld.game import Game, GameState
from megatron_spear.envs.alfworld.objective import Objective, read_sentence
from megatron_spear.envs.alfworld.rules import WELCOME_TEXT
from megatron_spear.envs.alfworld.text import intro
from megatron_spear.envs.demonstration import Demonstration, DemonstrationTurn, patience

MAX_EXPLORE = 6  # most places searched before the hint

MAX_SLIPS = 3  # most impossible actions in a row
_NAME = re.compile(r"\ba ([a-z]+ \d+)")


def demonstrate(
    game: Game,
    rng: random.Random,
    *,
    explore: float,
    noise: float,
    max_turns: int,
    admissible: bool = False,
) -> Demonstration | None:
    """Play ``game`` to its end.

    Args:
        game: one of the six task types, generated or official.
        rng: where all chance comes from.
        explore: mean number of places searched for the first object before the hint, >= 0
            (geometric, at most `MAX_EXPLORE`); half of it for a second object or the lamp.
        noise: chance, before each action, of a slip: an impossible action, answered with
            "Nothing happens." and marked ``trained=False``; after a slip, of one more (at most
            `MAX_SLIPS` in a row).
        max_turns: most turns, slips included.
        admissible: note the possible actions of each turn (the official prompt lists them).

    Returns:
        The demonstration; None when winning would take more than ``max_turns``.
    """
    player = _Player(game, rng, noise, max_turns, admissible)
    with contextlib.suppress(_GameOver):
        _solve(player, read_sentence(game.task), explore)
    return Demonstration(tuple(player.turns)) if player.state.won else None


class _GameOver(Exception):
    """The game is won, or the turns are used up."""


class _Player:
    """Plays through commands and texts, and remembers what it has read."""

    def __init__(
        self, game: Game, rng: random.Random, noise: float, max_turns: int, admissible: bool
    ):
        self.game, self.rng = game, rng
        self.state = GameState(game)
        self.turns: list[DemonstrationTurn] = []
        self.observation = intro(self.state).removeprefix(WELCOME_TEXT)
        self.places: list[str] = _NAME.findall(self.observation.partition("you see")[2])
        self.seen: dict[str, list[str]] = {}
        self.brought: set[str] = set()
        self.wanted = read_sentence(game.task).object
        self._noise, self._max_turns, self._lists_admissible = noise, max_turns, admissible

    def do(self, action: str) -> str:
        """One action to learn, after slips now and then; gives the answer."""
        for _ in range(MAX_SLIPS):
            if self.rng.random() >= self._noise:
                break
            slip = self._impossible_action(action)
            if slip is not None:
                self._turn(slip, trained=False)
        return self._turn(action, trained=True)

    def look_into(self, place: str) -> None:
        """Go there, open it if it is closed, and remember what is in it."""
        text = self.go(place)
        if place not in self.seen and not text:
            # Another receptacle of this spot: one cannot go to where one is.
            text = self._read(place, self.do(f"examine {place}"))
        if text.endswith("is closed."):
            self._read(place, self.do(f"open {place}"))

    def go(self, place: str) -> str:
        """Go there and read what is on it; "" when the agent stands there already."""
        here = self.game.receptacles_at.get(self.state.location, ())
        if self.game.id_of[place] in here:
            return ""
        return self._read(place, self.do(f"go to {place}"))

    def take(self, thing: str, place: str) -> None:
        """Take it, and let go of the memory of where it was."""
        self.do(f"take {thing} from {place}")
        self.seen[place].remove(thing)

    def put(self, thing: str, place: str) -> None:
        """Put it there, which needs an open door."""
        self.look_into(place)
        self.do(f"move {thing} to {place}")
        self.brought.add(thing)

    def _read(self, place: str, text: str) -> str:
        if "you see" in text:
            self.seen[place] = _NAME.findall(text.partition("you see")[2])
        return text

    def _turn(self, action: str, *, trained: bool) -> str:
        if len(self.turns) >= self._max_turns:
            raise _GameOver
        info = {"admissible": admissible_actions(self.state)} if self._lists_admissible else {}
        reply = act(self.state, action)
        assert reply.valid == trained, f"game {self.game.id}: {action!r} gave {reply.feedback!r}"
        self.turns.append(DemonstrationTurn(self.observation, action, trained, info))
        self.observation = reply.feedback
        if self.state.won:
            raise _GameOver
        return reply.feedback

    def _impossible_action(self, intended: str) -> str | None:
        """Something like what a young policy gets wrong; None when five tries were all possible."""
        for _ in range(5):
            action = self.rng.choice(_SLIPS)(self, intended)
            if not act(self.state.copy(), action).valid:
                return action
        return None

    def here(self) -> str:
        """The place where the player stands; any place at the start."""
        names = [self.game.names[r] for r in self.game.receptacles_at.get(self.state.location, ())]
        return self.rng.choice(names or self.places)

    def some_place(self) -> str:
        """A place of the room."""
        return self.rng.choice(self.places)

    def some_thing(self) -> str:
        """A thing seen so far; a place while there is none."""
        known = [thing for things in self.seen.values() for thing in things]
        return self.rng.choice(known or self.places)


def _wrong_number(player: _Player, intended: str) -> str:
    return re.sub(r"\d+", lambda _: str(player.rng.randint(1, 9)), intended, count=1)


def _wrong_place(player: _Player, intended: str) -> str:
    return re.sub(r"[a-z]+ \d+$", player.some_place(), intended)


def _take_absent(player: _Player, intended: str) -> str:
    """What a young policy does most: reach for the wanted object where it is not."""
    return f"take {player.wanted} {player.rng.randint(1, 2)} from {player.here()}"


def _move_absent(player: _Player, intended: str) -> str:
    return f"move {player.wanted} {player.rng.randint(1, 2)} to {player.here()}"


def _cut_short(player: _Player, intended: str) -> str:
    return intended.rsplit(" ", 1)[0]


_SLIPS: tuple[Callable[[_Player, str], str], ...] = (
    *[_take_absent] * 6,
    *[_move_absent] * 2,
    _wrong_number,
    _wrong_place,
    _cut_short,
    lambda player, _: f"take {player.some_thing()} from {player.some_place()}",
    lambda player, _: f"move {player.some_thing()} to {player.some_place()}",
    lambda player, _: f"open {player.some_place()}",
    lambda player, _: f"go to {player.some_place()}",
    lambda player, _: f"use {player.some_thing()}",
)


def _solve(player: _Player, objective: Objective, explore: float) -> None:
    """Bring one object after the other until the game is over."""
    if objective.task_type == "look_at_obj_in_light":
        _bring_to_light(player, objective, explore)
        return
    treatment = objective.treatment
    targets = _named(player, objective.receptacle)
    target = targets[0]
    avoided = {
        "pick_and_place_simple": targets,  # with one of them there the game were won
        "pick_two_obj_and_place": [target],
    }.get(objective.task_type, [])
    for mean in (explore, explore / 2):
        thing, place = _find(player, objective.object, mean, avoided)
        player.take(thing, place)
        if treatment is not None:
            appliance = _named(player, treatment.appliance.lower())[0]
            player.go(appliance)
            player.do(f"{treatment.verb} {thing} with {appliance}")
        player.put(thing, target)


def _bring_to_light(player: _Player, objective: Objective, explore: float) -> None:
    thing, place = _find(player, objective.object, explore, [])
    player.take(thing, place)
    lamp, _ = _find(player, objective.receptacle, explore / 2, [])
    player.do(f"use {lamp}")


def _find(player: _Player, kind: str, explore: float, avoided: Sequence[str]) -> tuple[str, str]:
    """An object of a kind, and the place where it is in sight and the player stands.

    Remembers one, or searches a number of places drawn with mean ``explore``, then goes straight to
    a right one. Objects in ``avoided`` places and those already brought do not count.
    """
    left = patience(player.rng, explore, MAX_EXPLORE)
    while True:
        known = _remembered(player, kind, avoided)
        if known is not None:
            player.go(known[1])
            return known
        unseen = [p for p in player.places if p not in player.seen and p not in avoided]
        if left <= 0:
            unseen = [p for p in unseen if _holds(player, p, kind)]
        if not unseen:
            raise _GameOver  # too few such objects: no game of ours, and no official one
        left -= 1
        player.look_into(unseen[0])


def _remembered(player: _Player, kind: str, avoided: Sequence[str]) -> tuple[str, str] | None:
    for place, things in player.seen.items():
        for thing in things:
            if thing.split()[0] == kind and place not in avoided and thing not in player.brought:
                return thing, place
    return None


def _holds(player: _Player, place: str, kind: str) -> bool:
    """The hint: whether an object of a kind lies in a place not looked into."""
    names = player.game.names
    things = player.state.contents[player.game.id_of[place]]
    return any(names[thing].split()[0] == kind for thing in things)


def _named(player: _Player, kind: str) -> list[str]:
    """The receptacles of a kind, the lowest number first: ``["desk 1", "desk 2"]``."""
    found = [place for place in player.places if place.split()[0] == kind]
    return sorted(found, key=lambda place: int(place.split()[1]))
