"""What stands in ALFWorld's rooms and where things usually lie: the facts games are generated from.

Counted on 489 games of ALFWorld's train split (MIT): which object types a receptacle type takes,
which objects can be cleaned, heated and so on, and how often each object lies on each receptacle.
"""

from typing import NamedTuple


class Fixture(NamedTuple):
    """How many receptacles of one type a room gets: at least ``fewest``, at most ``most``.

    ``weight`` is the relative chance of being drawn while the room still has space.
    """

    fewest: int
    most: int
    weight: float


class Habit(NamedTuple):
    """One object type in one room: its mean count there, and percent by receptacle type."""

    frequency: float
    places: dict[str, float]


OPENABLE = frozenset({"Cabinet", "Drawer", "Fridge", "Microwave", "Safe"})
LAMP = "DeskLamp"
LAMP_PLACES = {"SideTable": 42.0, "Desk": 28.0, "Dresser": 20.0, "Shelf": 7.0, "CoffeeTable": 3.0}

# Ids of these begin with the fixture they belong to: Sink_bar_.._bar_SinkBasin is "sinkbasin 1".
BASINS = {"SinkBasin": "Sink", "BathtubBasin": "Bathtub"}

# PDDL predicates that hold for every object of a type.
PROPERTIES: dict[str, frozenset[str]] = {
    predicate: frozenset(objects.split())
    for predicate, objects in {
        "cleanable": (
            "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce Mug "
            "Pan Plate Pot Potato SoapBar Spatula Spoon Tomato"
        ),
        "heatable": "Apple Bread Cup Egg Mug Plate Potato Tomato",
        "coolable": "Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle",
        "sliceable": "Apple Bread Egg Lettuce Potato Tomato",
        "isReceptacleObject": "Bowl Box Cup Mug Pan Plate Pot",
    }.items()
}

ROOM_FIXTURES: dict[str, dict[str, Fixture]] = {
    "kitchen": {
        "Fridge": Fixture(1, 1, 0),
        "Microwave": Fixture(1, 1, 0),
        "SinkBasin": Fixture(1, 1, 0),
        "CounterTop": Fixture(1, 4, 2),
        "Cabinet": Fixture(0, 27, 4),
        "Drawer": Fixture(0, 27, 3),
        "DiningTable": Fixture(0, 3, 2),
        "StoveBurner": Fixture(0, 6, 2),
        "GarbageCan": Fixture(0, 1, 3),
        "CoffeeMachine": Fixture(0, 1, 2),
        "Toaster": Fixture(0, 1, 1),
        "Shelf": Fixture(0, 3, 1),
        "SideTable": Fixture(0, 1, 0.5),
    },
    "bedroom": {
        "Bed": Fixture(1, 2, 0.2),
        "Desk": Fixture(0, 2, 2),
        "Drawer": Fixture(0, 17, 4),
        "Shelf": Fixture(0, 12, 2),
        "SideTable": Fixture(0, 2, 2),
        "Dresser": Fixture(0, 2, 1.5),
        "GarbageCan": Fixture(0, 1, 3),
        "ArmChair": Fixture(0, 3, 1),
        "Cabinet": Fixture(0, 4, 0.5),
        "LaundryHamper": Fixture(0, 1, 1),
        "Safe": Fixture(0, 1, 0.7),
        "DiningTable": Fixture(0, 1, 0.3),
        "CounterTop": Fixture(0, 1, 0.1),
    },
    "living": {
        "Sofa": Fixture(1, 2, 0.5),
        "CoffeeTable": Fixture(0, 2, 2),
        "ArmChair": Fixture(0, 3, 2.5),
        "SideTable": Fixture(0, 5, 2),
        "Drawer": Fixture(0, 21, 3),
        "Shelf": Fixture(0, 14, 1.5),
        "Dresser": Fixture(0, 2, 1),
        "GarbageCan": Fixture(0, 1, 3),
        "TVStand": Fixture(0, 2, 1),
        "DiningTable": Fixture(0, 2, 1),
        "Cabinet": Fixture(0, 8, 0.5),
        "Ottoman": Fixture(0, 1, 0.4),
        "Desk": Fixture(0, 1, 0.1),
    },
    "bathroom": {
        "Toilet": Fixture(1, 1, 0),
        "SinkBasin": Fixture(1, 2, 1),
        "CounterTop": Fixture(0, 2, 2),
        "Cabinet": Fixture(0, 9, 2),
        "Drawer": Fixture(0, 14, 2),
        "Shelf": Fixture(0, 8, 1),
        "GarbageCan": Fixture(0, 1, 3),
        "BathtubBasin": Fixture(0, 1, 1.5),
        "HandTowelHolder": Fixture(0, 4, 1.5),
        "TowelHolder": Fixture(0, 2, 1),
        "ToiletPaperHanger": Fixture(0, 1, 2),
        "Cart": Fixture(0, 1, 0.3),
        "SideTable": Fixture(0, 1, 0.3),
        "Dresser": Fixture(0, 1, 0.3),
    },
}

CAN_CONTAIN: dict[str, frozenset[str]] = {
    name: frozenset(objects.split())
    for name, objects in {
        "ArmChair": (
            "Book Box CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow RemoteControl"
        ),
        "BathtubBasin": "Cloth DishSponge HandTowel SoapBar",
        "Bed": "BaseballBat BasketBall Book CellPhone Laptop Pillow TennisRacket",
        "Cabinet": (
            "Book Bowl Box CD Candle Cloth Cup DishSponge Glassbottle HandTowel Kettle "
            "Ladle Mug Newspaper Pan PepperShaker Plate Plunger Pot SaltShaker SoapBar "
            "SoapBottle SprayBottle TissueBox ToiletPaper Vase WateringCan WineBottle"
        ),
        "Cart": (
            "Candle Cloth DishSponge HandTowel Plunger SoapBar SoapBottle SprayBottle "
            "TissueBox ToiletPaper"
        ),
        "CoffeeMachine": "Mug",
        "CoffeeTable": (
            "Book Bowl Box Candle CellPhone CreditCard KeyChain Laptop Newspaper Pen Pencil "
            "Plate RemoteControl Statue TissueBox Vase Watch WateringCan"
        ),
        "CounterTop": (
            "AlarmClock Apple Book Bowl Bread ButterKnife CD Candle CellPhone Cloth "
            "CreditCard Cup DishSponge Egg Fork Glassbottle HandTowel Kettle KeyChain Knife "
            "Ladle Laptop Lettuce Mug Pan Pen Pencil PepperShaker Plate Pot Potato "
            "RemoteControl SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle Statue "
            "TissueBox ToiletPaper Tomato Vase WineBottle"
        ),
        "Desk": (
            "AlarmClock BasketBall Book Bowl Box CD CellPhone Cloth CreditCard KeyChain "
            "Laptop Mug Pen Pencil RemoteControl Statue TennisRacket TissueBox Vase Watch "
            "WateringCan"
        ),
        "DiningTable": (
            "AlarmClock Apple BaseballBat BasketBall Book Bowl Box Bread ButterKnife CD "
            "Candle CellPhone Cloth CreditCard Cup DishSponge Egg Fork Glassbottle Kettle "
            "KeyChain Knife Ladle Laptop Lettuce Mug Newspaper Pan Pen Pencil PepperShaker "
            "Plate Pot Potato RemoteControl SaltShaker SoapBottle Spatula Spoon SprayBottle "
            "Statue TennisRacket TissueBox Tomato Vase Watch WateringCan WineBottle"
        ),
        "Drawer": (
            "Book ButterKnife CD Candle CellPhone Cloth CreditCard DishSponge Fork "
            "HandTowel KeyChain Knife Ladle Newspaper Pen Pencil PepperShaker RemoteControl "
            "SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle TissueBox ToiletPaper "
            "Watch WateringCan"
        ),
        "Dresser": (
            "AlarmClock BasketBall Book Bowl Box CD Candle CellPhone Cloth CreditCard "
            "KeyChain Laptop Mug Newspaper Pen Pencil Plate RemoteControl SprayBottle "
            "Statue TennisRacket TissueBox ToiletPaper Vase Watch WateringCan"
        ),
        "Fridge": (
            "Apple Bowl Bread Cup Egg Glassbottle Lettuce Mug Pan Plate Pot Potato Tomato "
            "WineBottle"
        ),
        "GarbageCan": (
            "Apple Bread CD Cloth DishSponge Egg HandTowel Lettuce Newspaper Pen Pencil "
            "Potato SoapBar SoapBottle SprayBottle TissueBox ToiletPaper Tomato WineBottle"
        ),
        "HandTowelHolder": "HandTowel",
        "LaundryHamper": "Cloth",
        "Microwave": "Apple Bowl Bread Cup Egg Glassbottle Mug Plate Potato Tomato",
        "Ottoman": "Book Box CellPhone CreditCard KeyChain Laptop Newspaper Pillow RemoteControl",
        "Safe": "CD CellPhone CreditCard KeyChain Statue Vase",
        "Shelf": (
            "AlarmClock Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup DishSponge "
            "Glassbottle HandTowel Kettle KeyChain Mug Newspaper Pen Pencil PepperShaker "
            "Plate Pot RemoteControl SaltShaker SoapBar SoapBottle SprayBottle Statue "
            "TissueBox ToiletPaper Vase Watch WateringCan WineBottle"
        ),
        "SideTable": (
            "AlarmClock Apple BaseballBat BasketBall Book Bowl Box Bread ButterKnife CD "
            "Candle CellPhone Cloth CreditCard Cup DishSponge Egg Fork HandTowel Kettle "
            "KeyChain Knife Laptop Lettuce Mug Newspaper Pan Pen Pencil PepperShaker Plate "
            "Pot Potato RemoteControl SaltShaker SoapBar SoapBottle Spatula Spoon "
            "SprayBottle Statue TennisRacket TissueBox ToiletPaper Tomato Vase Watch "
            "WateringCan WineBottle"
        ),
        "SinkBasin": (
            "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Glassbottle HandTowel "
            "Kettle Knife Ladle Lettuce Mug Pan Plate Pot Potato SoapBar Spatula Spoon "
            "Tomato"
        ),
        "Sofa": "Book Box CellPhone CreditCard KeyChain Laptop Newspaper Pillow RemoteControl",
        "StoveBurner": "Kettle Pan Pot",
        "TVStand": "TissueBox",
        "ToiletPaperHanger": "ToiletPaper",
        "Toilet": (
            "Candle Cloth DishSponge HandTowel SoapBar SoapBottle SprayBottle TissueBox ToiletPaper"
        ),
        "TowelHolder": "Towel",
    }.items()
}

# One line an object type: its mean count in such a room, then percent by receptacle type.
_HABITS = {
    "kitchen": """
Apple 2.0 Fridge 26 CounterTop 22 DiningTable 17 Microwave 14 GarbageCan 11 SinkBasin 8
Book 0.2 CounterTop 62 Cabinet 21 DiningTable 10 Shelf 5
Bowl 1.8 Cabinet 42 Fridge 20 CounterTop 20 DiningTable 12
Bread 1.6 CounterTop 57 DiningTable 31 Fridge 11
ButterKnife 1.8 CounterTop 60 DiningTable 26 SinkBasin 7 Drawer 6
CellPhone 0.2 CounterTop 47 Drawer 29 DiningTable 24
CreditCard 0.2 CounterTop 54 Drawer 40 Shelf 6
Cup 2.0 Cabinet 21 Fridge 20 CounterTop 20 DiningTable 16 SinkBasin 11 Microwave 8 Shelf 3
DishSponge 1.9 CounterTop 24 Drawer 23 Cabinet 22 DiningTable 13 SinkBasin 8 GarbageCan 6 Shelf 3
Egg 1.9 Fridge 27 CounterTop 24 SinkBasin 13 DiningTable 12 Microwave 11 GarbageCan 11
Fork 2.0 CounterTop 46 DiningTable 25 Drawer 19 SinkBasin 8
Glassbottle 0.4 Cabinet 31 CounterTop 25 DiningTable 18 SinkBasin 14 Fridge 10
Kettle 0.9 StoveBurner 39 CounterTop 25 Cabinet 24 DiningTable 8 SinkBasin 3
Knife 1.9 CounterTop 49 DiningTable 26 Drawer 20 SinkBasin 4
Ladle 0.7 CounterTop 41 Cabinet 28 Drawer 15 DiningTable 14
Lettuce 1.9 CounterTop 43 Fridge 25 DiningTable 24 SinkBasin 5
Mug 2.2 CounterTop 28 Cabinet 18 CoffeeMachine 16 Fridge 13 DiningTable 10 Microwave 6 SinkBasin 6
Pan 1.8 StoveBurner 54 CounterTop 32 Cabinet 7 Fridge 4 DiningTable 3
Pen 0.1 CounterTop 45 Drawer 30 DiningTable 18 GarbageCan 6
PepperShaker 2.1 Cabinet 37 CounterTop 30 DiningTable 17 Drawer 12 Shelf 3
Plate 1.8 Cabinet 42 CounterTop 28 DiningTable 16 Fridge 8
Pot 1.8 StoveBurner 74 CounterTop 14 DiningTable 4 Cabinet 4 Fridge 4
Potato 1.9 CounterTop 32 Fridge 26 DiningTable 13 Microwave 12 SinkBasin 10 GarbageCan 6
SaltShaker 2.0 CounterTop 34 Cabinet 34 DiningTable 15 Drawer 13 SideTable 3
SoapBottle 2.0 CounterTop 33 Cabinet 28 DiningTable 22 GarbageCan 12 Shelf 3
Spatula 1.9 CounterTop 45 DiningTable 27 Drawer 21 SinkBasin 7
Spoon 2.0 CounterTop 39 Drawer 28 DiningTable 20 SinkBasin 11
SprayBottle 0.2 CounterTop 38 Cabinet 33 DiningTable 15 GarbageCan 13
Statue 0.3 CounterTop 54 Shelf 41 DiningTable 5
Tomato 2.0 Fridge 35 CounterTop 30 DiningTable 20 SinkBasin 7 GarbageCan 6
Vase 0.4 Cabinet 36 CounterTop 33 Shelf 30
WineBottle 0.8 CounterTop 38 Cabinet 27 DiningTable 22 GarbageCan 10
""",
    "bedroom": """
AlarmClock 1.7 Desk 37 Shelf 21 SideTable 19 Dresser 15 DiningTable 5 CounterTop 3
Book 1.8 Bed 51 Desk 18 Drawer 13 SideTable 5 Dresser 4 DiningTable 3
Bowl 0.7 Desk 45 Shelf 24 Dresser 18 DiningTable 7 CounterTop 4
Box 0.1 Desk 50 Shelf 50
CD 1.9 Drawer 30 Desk 17 Dresser 15 SideTable 14 GarbageCan 11 Shelf 8 Cabinet 3 DiningTable 3
CellPhone 2.1 Bed 25 Desk 21 Drawer 16 Dresser 11 Shelf 11 SideTable 8 ArmChair 4
CreditCard 2.0 Drawer 30 Desk 17 Shelf 16 Dresser 14 SideTable 13 ArmChair 6 DiningTable 3
KeyChain 1.9 Drawer 23 SideTable 21 Desk 19 Shelf 17 Dresser 15 Safe 3
Laptop 1.6 Bed 76 Desk 17 Dresser 3 DiningTable 3
Mug 0.8 Desk 41 Shelf 18 SideTable 16 DiningTable 9 Dresser 8 Cabinet 6 CounterTop 2
Pen 2.2 Desk 27 Dresser 22 Shelf 18 Drawer 14 SideTable 13 DiningTable 3
Pencil 2.1 Desk 23 SideTable 22 Drawer 16 Dresser 14 Shelf 13 GarbageCan 6 DiningTable 4
Pillow 1.6 Bed 99
RemoteControl 0.3 Drawer 36 Desk 25 DiningTable 14 SideTable 11 CounterTop 11 ArmChair 4
Statue 0.2 Shelf 38 Dresser 29 Desk 17 SideTable 17
TissueBox 0.3 Desk 32 Shelf 21 Drawer 21 SideTable 14 DiningTable 11
Vase 0.2 Shelf 44 Dresser 44 SideTable 11
Watch 0.1 Drawer 50 Dresser 20 Shelf 20 Desk 10
""",
    "living": """
Book 0.3 Dresser 27 CoffeeTable 27 SideTable 18 DiningTable 14 Sofa 9 ArmChair 5
Box 1.2 Sofa 37 DiningTable 22 CoffeeTable 14 SideTable 9 Shelf 5 Cabinet 4 ArmChair 4 Dresser 3
Candle 0.3 SideTable 48 CoffeeTable 33 DiningTable 19
CellPhone 0.3 Dresser 39 SideTable 22 Sofa 17 Desk 6 CoffeeTable 6 Drawer 6 Ottoman 6
CreditCard 2.0 CoffeeTable 21 Sofa 19 ArmChair 19 Drawer 10 DiningTable 9 SideTable 8 Shelf 8
KeyChain 1.3 CoffeeTable 21 Sofa 17 SideTable 13 Drawer 12 Shelf 10 ArmChair 10 DiningTable 7
Laptop 1.3 Sofa 31 CoffeeTable 29 DiningTable 20 SideTable 8 Dresser 6 ArmChair 4
Newspaper 1.2 Sofa 24 CoffeeTable 24 DiningTable 13 ArmChair 11 Shelf 9 SideTable 9 Dresser 8
Pen 0.3 Dresser 25 CoffeeTable 20 SideTable 15 Shelf 15 GarbageCan 10 Drawer 10 DiningTable 5
Pencil 0.2 CoffeeTable 50 SideTable 25 GarbageCan 17 Shelf 8
Pillow 1.1 Sofa 84 ArmChair 16
Plate 0.5 DiningTable 53 Shelf 22 SideTable 12 CoffeeTable 12
RemoteControl 1.7 CoffeeTable 25 Sofa 24 SideTable 15 Dresser 10 ArmChair 9 DiningTable 9 Drawer 4
Statue 1.9 CoffeeTable 26 DiningTable 25 Shelf 24 SideTable 15 Dresser 10
TissueBox 0.7 CoffeeTable 40 DiningTable 31 Shelf 11 TVStand 11 SideTable 4
Vase 1.2 Shelf 46 CoffeeTable 21 DiningTable 14 SideTable 7 Cabinet 5 Dresser 5
Watch 1.1 CoffeeTable 27 SideTable 21 Drawer 18 DiningTable 14 Dresser 14 Shelf 6
WateringCan 0.1 CoffeeTable 62 Shelf 38
""",
    "bathroom": """
Candle 1.8 Toilet 33 CounterTop 29 Cabinet 14 Drawer 11 Shelf 8
Cloth 2.0 BathtubBasin 30 Cabinet 22 CounterTop 17 Drawer 16 SinkBasin 5 Shelf 3
DishSponge 0.5 BathtubBasin 24 CounterTop 18 Cart 14 Shelf 14 Drawer 12 Toilet 10 SinkBasin 4
HandTowel 1.3 HandTowelHolder 97 CounterTop 3
SoapBar 1.8 CounterTop 19 Toilet 16 SinkBasin 15 BathtubBasin 12 GarbageCan 11 Cabinet 10 Drawer 9
SoapBottle 1.7 CounterTop 29 Toilet 26 Cabinet 23 GarbageCan 9 Shelf 7 Drawer 4
SprayBottle 1.9 Toilet 31 CounterTop 31 Cabinet 14 GarbageCan 10 Shelf 5 Cart 5
TissueBox 0.3 CounterTop 33 Shelf 27 Drawer 24 Cabinet 9 Toilet 3 SideTable 3
ToiletPaper 2.0 Toilet 25 CounterTop 25 Cabinet 11 ToiletPaperHanger 11 Drawer 9 Shelf 7
Towel 1.1 TowelHolder 100
""",
}


def _read_habit(line: str) -> tuple[str, Habit]:
    kind, frequency, *rest = line.split()
    percents = map(float, rest[1::2])
    return kind, Habit(float(frequency), dict(zip(rest[::2], percents, strict=True)))


ROOM_HABITS: dict[str, dict[str, Habit]] = {
    room: dict(map(_read_habit, text.strip().splitlines())) for room, text in _HABITS.items()
}
