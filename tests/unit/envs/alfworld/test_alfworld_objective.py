"""Task sentences and goal formulas, read and written."""

import pytest

from megatron_spear.envs.alfworld.objective import (
    SENTENCES,
    Objective,
    read_goal,
    read_sentence,
    write_goal,
    write_sentence,
)
from megatron_spear.errors import DataError


@pytest.mark.parametrize(
    ("sentence", "task_type", "thing", "place"),
    [
        ("put some mug on desk.", "pick_and_place_simple", "mug", "desk"),
        ("look at pen under the desklamp.", "look_at_obj_in_light", "pen", "desklamp"),
        ("put a clean mug in shelf.", "pick_clean_then_place_in_recep", "mug", "shelf"),
        ("put a hot mug in shelf.", "pick_heat_then_place_in_recep", "mug", "shelf"),
        ("cool some egg and put it in fridge.", "pick_cool_then_place_in_recep", "egg", "fridge"),
        ("find two cd and put them in safe.", "pick_two_obj_and_place", "cd", "safe"),
    ],
)
def test_sentences_are_read(sentence: str, task_type: str, thing: str, place: str) -> None:
    expected = Objective(task_type, thing, place)
    assert read_sentence(f"Your task is to: {sentence}") == expected
    assert read_sentence(sentence) == expected


@pytest.mark.parametrize("task_type", SENTENCES)
def test_what_is_written_is_read_back(task_type: str) -> None:
    objective = Objective(task_type, "mug", "desk")
    for wording in (0, 1):
        assert read_sentence(write_sentence(objective, wording)) == objective
    assert read_goal(write_goal(objective, "Mug", "Desk"), "a game") == objective


def test_an_unknown_sentence_is_refused() -> None:
    with pytest.raises(DataError, match="none of the known wordings"):
        read_sentence("Your task is to: juggle three eggs.")


@pytest.mark.parametrize(
    "goal",
    [
        "(:goal (and (opened fridge_1)))",
        "(:goal (and (objectType ?o AType) (receptacleType ?r BType) (isHot ?o) (isClean ?o)))",
        "",
    ],
)
def test_a_goal_of_another_form_is_refused(goal: str) -> None:
    with pytest.raises(DataError, match="a game: the goal asks for"):
        read_goal(goal, "a game")
