"""ALFWorld's rules as tables: actions, predicates, and the feedback grammar the texts are made
from.

Source: ``alfred.pddl`` and ``alfred.twl2`` of alfworld 0.4.2 (MIT). `text` and `engine` build their
words from these tables, and `rules_check` compares the tables with a game's own domain and grammar.
"""

from typing import NamedTuple


class Action(NamedTuple):
    """How one action is typed, the feedback rule that answers it, a digest of its PDDL text."""

    template: str
    feedback: str
    definition: str


HELP_TEXT = """\
Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""

INVALID_TEXT = "Nothing happens."
WELCOME_TEXT = "-= Welcome to TextWorld, ALFRED! =-\n\n"

ACTIONS = {
    "look": Action("look", "#look.feedback#", "7f737b804cd2"),
    "inventory": Action("inventory", "#inventory.feedback#", "bcba3d93cee8"),
    "help": Action("help", HELP_TEXT, "bcba3d93cee8"),
    "examineReceptacle": Action("examine {r}", "#examineReceptacle.feedback#", "072f377def3a"),
    "examineObject": Action("examine {o}", "#examineObject.feedback#", "5c3f682d5b60"),
    "GotoLocation": Action(
        "go to [{r.name | receptacleatlocation(r:receptacle, lend:location)}]",
        "#GotoLocation.feedback#",
        "a5d1aa092862",
    ),
    "OpenObject": Action("open {r}", "#OpenObject.feedback#", "a37340e03e0f"),
    "CloseObject": Action("close {r}", "#CloseObject.feedback#", "03c8d56b659e"),
    "PickupObject": Action("take {o} from {r}", "#PickupObject.feedback#", "59731c00c046"),
    "PutObject": Action("move {o} to {r}", "#PutObject.feedback#", "a0c9290ab86c"),
    "CleanObject": Action("clean {o} with {r}", "#cleanObject.feedback#", "1b7512a4daad"),
    "HeatObject": Action("heat {o} with {r}", "#heatObject.feedback#", "082831019a5f"),
    "CoolObject": Action("cool {o} with {r}", "#coolObject.feedback#", "9bd305845ec4"),
    "ToggleObject": Action("use {o}", "#toggleObject.feedback#", "61d451decfaf"),
    "SliceObject": Action("slice {co} with {ko}", "#sliceObject.feedback#", "cf1c61ea89c4"),
}

# Facts that an action can add or remove, with their number of arguments. `checked` is left out:
# actions set it, but no text, precondition or ALFWorld goal reads it.
DYNAMIC_PREDICATES = {
    "atlocation": 2,
    "objectatlocation": 2,
    "opened": 1,
    "inreceptacle": 2,
    "holds": 2,
    "holdsany": 1,
    "isclean": 1,
    "ishot": 1,
    "iscool": 1,
    "ison": 1,
    "istoggled": 1,
    "issliced": 1,
}

# Facts that stay as the problem states them.
STATIC_PREDICATES = {
    "receptacleatlocation": 2,
    "openable": 1,
    "isreceptacleobject": 1,
    "inreceptacleobject": 2,
    "isreceptacleobjectfull": 1,
    "wasinreceptacle": 2,
    "examined": 1,
    "receptacletype": 2,
    "cancontain": 2,
    "objecttype": 2,
    "holdsanyreceptacleobject": 1,
    "full": 1,
    "cleanable": 1,
    "heatable": 1,
    "coolable": 1,
    "pickupable": 1,
    "moveable": 1,
    "toggleable": 1,
    "sliceable": 1,
}

CLEANER_TYPES = frozenset({"sinktype", "sinkbasintype"})
HEATER_TYPES = frozenset({"microwavetype"})
COOLER_TYPES = frozenset({"fridgetype"})
KNIFE_TYPES = frozenset({"knifetype", "butterknifetype"})

_CONTENTS = "[{o.indefinite + ' ' + o.name | inreceptacle(o:object, r:receptacle)}]"
_FLOOR = (
    "atlocation(a:agent, l:location) & objectatlocation(o:object, l:location) & "
    "receptacleatlocation(r:receptacle, l:location) & not_inreceptacle(o:object, r:receptacle)"
)
_FACING = "atlocation(a:agent, l:location) & receptacleatlocation(r:receptacle, l:location)"

# Feedback grammar: a symbol gives the right-hand side of the first rule whose condition holds.
FEEDBACK: dict[str, tuple[tuple[str, str], ...]] = {
    "intro": (("", WELCOME_TEXT + "#look.feedback#\n\n#task#"),),
    "GotoLocation.feedback": (("", "You arrive at {r.name}. #examineReceptacle.feedback#"),),
    "OpenObject.feedback": (("", "You open the {r.name}. #examineReceptacle.feedback#"),),
    "CloseObject.feedback": (("", "You close the {r.name}."),),
    "PickupObject.feedback": (("", "You pick up the {o.name} from the {r.name}."),),
    "PutObject.feedback": (("", "You move the {o.name} to the {r.name}."),),
    "heatObject.feedback": (("", "You heat the {o.name} using the {r.name}."),),
    "cleanObject.feedback": (("", "You clean the {o.name} using the {r.name}."),),
    "coolObject.feedback": (("", "You cool the {o.name} using the {r.name}."),),
    "sliceObject.feedback": (("", "You sliced the {co.name} with the {ko.name}."),),
    "toggleObject.feedback": (
        ("toggleable(o:object) & istoggled(o:object)", "You turn on the {o.name}."),
        ("toggleable(o:object)", "You turn off the {o.name}."),
        ("", "You don't see any switch on the {o.name}."),
    ),
    "inventory.feedback": (
        (
            "holdsany(a:agent)",
            "You are carrying: [{o.indefinite + ' ' + o.name | holds(a:agent, o:object)}].",
        ),
        ("", "You are not carrying anything."),
    ),
    "examineReceptacle.feedback": (
        (
            "openable(r:receptacle) & opened(r:receptacle)",
            "The {r.name} is open. In it, you see " + _CONTENTS + ".",
        ),
        ("openable(r:receptacle)", "The {r.name} is closed."),
        ("", "On the {r.name}, you see " + _CONTENTS + "."),
    ),
    "examineObject.feedback": (
        (
            "isreceptacleobject(o:object)",
            "This is a normal {o.name}. In it, you see "
            "[{o2.indefinite + ' ' + o2.name | inreceptacleobject(o2:object, o:object)}].",
        ),
        (
            "isclean(o:object) & ishot(o:object) & issliced(o:object)",
            "This is a hot and clean sliced {o.name}.",
        ),
        (
            "isclean(o:object) & iscool(o:object) & issliced(o:object)",
            "This is a cool and clean sliced {o.name}.",
        ),
        ("isclean(o:object) & issliced(o:object)", "This is a clean sliced {o.name}."),
        ("ishot(o:object) & issliced(o:object)", "This is a hot sliced {o.name}."),
        ("iscool(o:object) & issliced(o:object)", "This is a cool sliced {o.name}."),
        ("isclean(o:object) & ishot(o:object)", "This is a hot and clean {o.name}."),
        ("isclean(o:object) & iscool(o:object)", "This is a cool and clean {o.name}."),
        ("ishot(o:object)", "This is a hot {o.name}."),
        ("isclean(o:object)", "This is a clean {o.name}."),
        ("iscool(o:object)", "This is a cold {o.name}."),
        ("toggleable(o:object) & istoggled(o:object)", "This {o.name} is on."),
        ("toggleable(o:object) & not_istoggled(o:object)", "This {o.name} is off."),
        ("sliceable(o:object) & issliced(o:object)", "This is a sliced {o.name}."),
        ("", "There's nothing special about {o.name}."),
    ),
    "look.feedback": (
        (_FACING, "#look-variations#. Next to it, you see #list_objects_on_the_floor#."),
        (
            "",
            "You are in the middle of a room. Looking quickly around you, you see "
            "#list_appliances#.",
        ),
    ),
    "look-variations": (("", "You are facing the [{r.name | " + _FACING + "}]"),),
    "list_objects_on_the_floor": ((_FLOOR, "[{#overview(o)# | " + _FLOOR + "}]"), ("", "nothing")),
    "list_appliances": (
        (
            "receptacleatlocation(r:receptacle, l:location)",
            "[{#overview(r)# | receptacleatlocation(r:receptacle, l:location)}]",
        ),
        ("", "nothing"),
    ),
    "overview(o)": (("", "{o.indefinite} {o.name}"),),
    "overview(r)": (("", "{r.indefinite} {r.name or r.id}"),),
    "list_empty": (("", "nothing"),),
    "list_separator": (("", ", "),),
    "list_last_separator": (("", ", and "),),
}
