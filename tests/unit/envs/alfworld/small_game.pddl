; A small hand-written kitchen that has one of everything the ALFWorld domain can do.
(define (problem small_kitchen)
(:domain alfred)
(:objects
    agent1 - agent
    loc_bar_0 loc_bar_1 loc_bar_2 loc_bar_3 loc_bar_4 loc_bar_5 - location
    MugType AppleType KnifeType DeskLampType PlateType SpoonType - otype
    CounterTopType DrawerType SinkBasinType MicrowaveType FridgeType - rtype
    CounterTop_bar_1 Drawer_bar_1 Drawer_bar_2 Sink_bar_1_bar_SinkBasin Microwave_bar_1
    Fridge_bar_1 - receptacle
    Mug_bar_1 Mug_bar_2 Apple_bar_1 Apple_bar_2 Knife_bar_1 DeskLamp_bar_1 Plate_bar_1
    Spoon_bar_1 - object
    Curtains - object
)
(:init
    (= (total-cost) 0)
    (= (distance loc_bar_0 loc_bar_1) 3)
    (atLocation agent1 loc_bar_0)

    (receptacleType CounterTop_bar_1 CounterTopType) (receptacleAtLocation CounterTop_bar_1 loc_bar_1)
    (receptacleType Drawer_bar_1 DrawerType) (receptacleAtLocation Drawer_bar_1 loc_bar_2)
    (receptacleType Drawer_bar_2 DrawerType) (receptacleAtLocation Drawer_bar_2 loc_bar_2)
    (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType)
    (receptacleAtLocation Sink_bar_1_bar_SinkBasin loc_bar_3)
    (receptacleType Microwave_bar_1 MicrowaveType) (receptacleAtLocation Microwave_bar_1 loc_bar_4)
    (receptacleType Fridge_bar_1 FridgeType) (receptacleAtLocation Fridge_bar_1 loc_bar_5)
    (openable Drawer_bar_1) (openable Microwave_bar_1) (openable Fridge_bar_1)

    (canContain CounterTopType MugType) (canContain CounterTopType AppleType)
    (canContain CounterTopType KnifeType) (canContain CounterTopType PlateType)
    (canContain CounterTopType SpoonType) (canContain DrawerType MugType)
    (canContain DrawerType SpoonType) (canContain DrawerType KnifeType)
    (canContain SinkBasinType MugType) (canContain SinkBasinType AppleType)
    (canContain MicrowaveType MugType) (canContain MicrowaveType AppleType)
    (canContain FridgeType MugType) (canContain FridgeType AppleType)

    (objectType Mug_bar_1 MugType) (objectType Mug_bar_2 MugType)
    (objectType Apple_bar_1 AppleType) (objectType Apple_bar_2 AppleType)
    (objectType Knife_bar_1 KnifeType) (objectType DeskLamp_bar_1 DeskLampType)
    (objectType Plate_bar_1 PlateType) (objectType Spoon_bar_1 SpoonType)

    (pickupable Mug_bar_1) (pickupable Mug_bar_2) (pickupable Apple_bar_1) (pickupable Apple_bar_2)
    (pickupable Knife_bar_1) (pickupable Plate_bar_1) (pickupable Spoon_bar_1)
    (cleanable Mug_bar_1) (cleanable Mug_bar_2) (cleanable Apple_bar_1) (cleanable Apple_bar_2)
    (heatable Mug_bar_1) (heatable Mug_bar_2) (heatable Apple_bar_1) (heatable Apple_bar_2)
    (coolable Mug_bar_1) (coolable Mug_bar_2) (coolable Apple_bar_1) (coolable Apple_bar_2)
    (sliceable Apple_bar_1) (sliceable Apple_bar_2)
    (toggleable DeskLamp_bar_1) (toggleable Spoon_bar_1)
    (isReceptacleObject Plate_bar_1) (inReceptacleObject Spoon_bar_1 Plate_bar_1)
    (isCool Apple_bar_2)

    (inReceptacle Mug_bar_1 CounterTop_bar_1) (objectAtLocation Mug_bar_1 loc_bar_1)
    (inReceptacle Apple_bar_1 CounterTop_bar_1) (objectAtLocation Apple_bar_1 loc_bar_1)
    (inReceptacle Knife_bar_1 CounterTop_bar_1) (objectAtLocation Knife_bar_1 loc_bar_1)
    (inReceptacle DeskLamp_bar_1 CounterTop_bar_1) (objectAtLocation DeskLamp_bar_1 loc_bar_1)
    (inReceptacle Plate_bar_1 CounterTop_bar_1) (objectAtLocation Plate_bar_1 loc_bar_1)
    (inReceptacle Spoon_bar_1 CounterTop_bar_1) (objectAtLocation Spoon_bar_1 loc_bar_1)
    (inReceptacle Spoon_bar_1 Drawer_bar_2)
    (inReceptacle Mug_bar_2 Drawer_bar_1) (objectAtLocation Mug_bar_2 loc_bar_2)
    (inReceptacle Apple_bar_2 Fridge_bar_1) (objectAtLocation Apple_bar_2 loc_bar_5)
)
(:goal
    (and
        (exists (?r - receptacle)
            (exists (?o - object)
                (and
                    (objectType ?o MugType)
                    (receptacleType ?r DrawerType)
                    (isClean ?o)
                    (inReceptacle ?o ?r)
                )
            )
        )
    )
)
)
