"""What a game asks for, read from its task sentence or its goal formula, and written as both."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_spear.errors import DataError

TASK_PREFIX = "Your task is to: "

# The wordings of the official games; {o} names the object, {r} the receptacle (or the lamp).
SENTENCES: Mapping[str, tuple[str, str]] = {
    "pick_and_place_simple": ("put a {o} in {r}.", "put some {o} on {r}."),
    "look_at_obj_in_light": ("look at {o} under the {r}.", "examine the {o} with the {r}."),
    "pick_clean_then_place_in_recep": (
        "put a clean {o} in {r}.",
        "clean some {o} and put it in {r}.",
    ),
    "pick_heat_then_place_in_recep": ("put a hot {o} in {r}.", "heat some {o} and put it in {r}."),
    "pick_cool_then_place_in_recep": ("put a cool {o} in {r}.", "cool some {o} and put it in {r}."),
    "pick_two_obj_and_place": ("put two {o} in {r}.", "find two {o} and put them in {r}."),
}


@dataclass(frozen=True)
class Treatment:
    """What is done to an object before it is put down: command verb, PDDL names, where."""

    verb: str
    property: str
    state: str
    appliance: str


TREATMENTS: Mapping[str, Treatment] = {
    "pick_clean_then_place_in_recep": Treatment("clean", "cleanable", "isClean", "SinkBasin"),
    "pick_heat_then_place_in_recep": Treatment("heat", "heatable", "isHot", "Microwave"),
    "pick_cool_then_place_in_recep": Treatment("cool", "coolable", "isCool", "Fridge"),
}


@dataclass(frozen=True)
class Objective:
    """A task type with its object type and receptacle type, lower-case and without ``type``.

    Example: "put two mug in desk." is ``Objective("pick_two_obj_and_place", "mug", "desk")``; for
    `look_at_obj_in_light` the receptacle is the lamp, ``desklamp``.
    """

    task_type: str
    object: str
    receptacle: str

    @property
    def treatment(self) -> Treatment | None:
        """How the object must be treated; None for the three tasks without."""
        return TREATMENTS.get(self.task_type)


def write_sentence(objective: Objective, wording: int) -> str:
    """The task sentence as the player reads it; ``wording`` is 0 or 1."""
    form = SENTENCES[objective.task_type][wording]
    return TASK_PREFIX + form.format(o=objective.object, r=objective.receptacle)


def read_sentence(sentence: str) -> Objective:
    """The objective in a task sentence; raises `DataError` for a wording no official game has."""
    text = sentence.strip().removeprefix(TASK_PREFIX)
    for task_type, pattern in _PATTERNS:
        found = pattern.fullmatch(text)
        if found is not None:
            return Objective(task_type, found["o"], found["r"])
    raise DataError(
        f"the task sentence {sentence!r} has none of the known wordings; expected for example "
        "'Your task is to: put a mug in desk.'. Use the official games or generated ones."
    )


def write_goal(objective: Objective, object_type: str, receptacle_type: str) -> str:
    """The ``(:goal ..)`` section as in the official problems of that task type.

    The two type names are written as given (``Mug``, ``Desk``), with ``Type`` behind.
    """
    treatment = objective.treatment
    form = _GOALS.get(objective.task_type, _TREATED_GOAL)
    values = {"o": object_type, "r": receptacle_type}
    if treatment is not None:
        values |= {"can": treatment.property, "is": treatment.state}
    return form.format(**values)


def read_goal(problem: str, where: str) -> Objective:
    """The objective in a problem's goal; raises `DataError` for a goal of another form."""
    goal = problem[max(problem.lower().rfind("(:goal"), 0) :].lower()
    objects = re.findall(r"\(objecttype\s+\?\w+\s+(\w+?)type\s*\)", goal)
    receptacles = re.findall(r"\(receptacletype\s+\?\w+\s+(\w+?)type\s*\)", goal)
    treated = [name for name, kind in TREATMENTS.items() if f"({kind.state.lower()} ?" in goal]
    if "(istoggled ?" in goal and len(objects) == 2 and not receptacles:
        return Objective("look_at_obj_in_light", objects[1], objects[0])
    if len(set(objects)) == 1 and len(set(receptacles)) == 1 and len(treated) <= 1:
        two = len(objects) == 2
        name = "pick_two_obj_and_place" if two else "pick_and_place_simple"
        if not (two and treated):
            return Objective(treated[0] if treated else name, objects[0], receptacles[0])
    raise DataError(
        f"{where}: the goal asks for objects {objects}, receptacles {receptacles}, {treated}; "
        f"expected one of the six task types {', '.join(SENTENCES)}. Leave the game out."
    )


_PATTERNS = tuple(
    (
        task_type,
        re.compile(
            re.escape(form).replace(r"\{o\}", r"(?P<o>\w+)").replace(r"\{r\}", r"(?P<r>\w+)")
        ),
    )
    for task_type, forms in SENTENCES.items()
    for form in forms
)

_PLACED_GOAL = """(:goal
    (and
        (exists (?r - receptacle)
            (exists (?o - object)
                (and
                    (inReceptacle ?o ?r)
                    (objectType ?o {o}Type)
                    (receptacleType ?r {r}Type)
                )
            )
        )
    )
)"""

_TREATED_GOAL = """(:goal
    (and
        (exists (?r - receptacle)
            (exists (?o - object)
                (and
                    ({can} ?o)
                    (objectType ?o {o}Type)
                    (receptacleType ?r {r}Type)
                    ({is} ?o)
                    (inReceptacle ?o ?r)
                )
            )
        )
    )
)"""

_TWO_GOAL = """(:goal
    (and
        (exists (?r - receptacle)
            (exists (?o1 - object)
                (and
                    (objectType ?o1 {o}Type)
                    (receptacleType ?r {r}Type)
                    (inReceptacle ?o1 ?r)
                    (exists (?o2 - object)
                        (and
                            (not (= ?o1 ?o2))
                            (objectType ?o2 {o}Type)
                            (receptacleType ?r {r}Type)
                            (inReceptacle ?o2 ?r)
                        )
                    )
                )
            )
        )
    )
)"""

_LIGHT_GOAL = """(:goal
    (and
        (exists (?ot - object ?r - receptacle ?a - agent ?l - location)
            (and
                (objectType ?ot {r}Type)
                (toggleable ?ot)
                (isToggled ?ot)
                (receptacleAtLocation ?r ?l)
                (atLocation ?a ?l)
                (inReceptacle ?ot ?r)
            )
        )
        (exists (?o - object ?a - agent)
            (and
                (objectType ?o {o}Type)
                (holds ?a ?o)
            )
        )
    )
)"""

_GOALS: Mapping[str, str] = {
    "pick_and_place_simple": _PLACED_GOAL,
    "pick_two_obj_and_place": _TWO_GOAL,
    "look_at_obj_in_light": _LIGHT_GOAL,
}
