"""A family from a list or from draws: what is held out, what is demonstrated, what is told."""

import pytest

from megatron_spear.config.schema import SftSection
from megatron_spear.envs.family import Panel
from megatron_spear.envs.simple import SimpleFamily
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.testing.toy_environment import CorridorEnvironment
from megatron_spear.types import Prompt


class Made(SimpleFamily):
    environment = CorridorEnvironment
    system = "You walk."

    def make_task(self, rng):
        return {"length": rng.randint(5, 60), "start": 1}


class Listed(SimpleFamily):
    environment = CorridorEnvironment
    task_kinds = ("even", "odd")
    slips = ("jump",)
    lengths = tuple(range(5, 105))

    def tasks(self):
        return [{"length": length, "start": 1} for length in self.lengths]

    def kind(self, task):
        return self.task_kinds[task["length"] % 2]

    def expert(self, task, observation, turns):
        return "right"


def _ids(source, count):
    return [source.at(position).prompt_id for position in range(count)]


def test_the_factory_names_the_class():
    assert Made.factory == "megatron_spear.testing.toy_environment:CorridorEnvironment"


def test_a_local_environment_has_no_name_for_workers():
    class Local(CorridorEnvironment):
        pass

    with pytest.raises(ConfigError, match="top level"):
        type("Bad", (SimpleFamily,), {"environment": Local})


def test_made_tasks_depend_on_their_seed_and_never_meet_the_panel():
    family = Made()
    assert _ids(family.training(0, 1), 30) == _ids(family.training(9, 1), 30)
    assert _ids(family.training(0, 1), 30) != _ids(family.training(0, 2), 30)
    held_out = {prompt.prompt_id for prompt in family.panel(5, 3).prompts}
    assert len(held_out) == 5 and not held_out & set(_ids(family.training(0, 1), 400))
    (message,) = family.training(0, 1).at(0).messages
    assert message == {"role": "system", "content": "You walk."}


def test_a_list_is_parted_by_its_contents_alone():
    family, other = Listed(), Listed()
    other.lengths = tuple(reversed(Listed.lengths + Listed.lengths))
    assert family.panel(10, 1) == other.panel(10, 2)
    trained = set(_ids(family.training(0, 1), 300))
    assert 60 < len(trained) < 95, "about four in five"
    assert trained == set(_ids(other.training(0, 1), 300))
    assert not trained & {prompt.prompt_id for prompt in family.panel(10, 1).prompts}


def test_kinds_are_drawn_apart():
    sources = Listed().training_by_kind(0, 1)
    assert list(sources) == ["even", "odd"]
    for kind, source in sources.items():
        assert {source.at(position).kind for position in range(20)} == {kind}
    with pytest.raises(ConfigError, match="one kind of task"):
        Made().training_by_kind(0, 1)


def test_demonstrations_slip_and_win():
    family = Listed()
    section = SftSection(noise=0.3)
    played = [family.demonstration(section, 1, index) for index in range(6)]
    slips = [turn for one in played for turn in one.turns if not turn.trained]
    assert slips and {turn.action for turn in slips} == {"jump"}
    assert {turn.action for one in played for turn in one.turns if turn.trained} == {"right"}
    calm = family.demonstration(SftSection(noise=0.0), 1, 0)
    assert all(turn.trained for turn in calm.turns)
    assert len(calm.turns) == calm.prompt.metadata["length"] - 2


def test_an_expert_that_loses_is_told():
    class Lost(Listed):
        def expert(self, task, observation, turns):
            return "left"

    with pytest.raises(DataError, match="expert lost 50 tasks in a row"):
        Lost().demonstration(SftSection(), 1, 0)


def test_what_a_family_does_not_have_is_told():
    class Bare(SimpleFamily):
        environment = CorridorEnvironment

    with pytest.raises(ConfigError, match="has no demonstrations"):
        Made().demonstration(SftSection(), 1, 0)
    with pytest.raises(ConfigError, match="has no word list"):
        Made().vocabulary()
    with pytest.raises(DataError, match="neither tasks\\(\\) nor make_task"):
        Bare().training(0, 0).at(0)


def test_too_few_tasks_are_told():
    family = Listed()
    with pytest.raises(DataError, match=r"got 60, but Listed has only .* held out"):
        family.panel(60, 1)
    family.held_out_every = 1
    with pytest.raises(DataError, match="tasks\\(\\) has none of 100 to train on"):
        family.training(0, 1)
    made = Made()
    made.held_out_every = 1
    with pytest.raises(DataError, match="no task to train on in 1000 tries"):
        made.training(0, 1).at(0)


def test_tasks_are_plain_values():
    class Odd(SimpleFamily):
        environment = CorridorEnvironment

        def make_task(self, rng):
            return {"length": {1, 2}}

    with pytest.raises(DataError, match="plain values"):
        Odd().training(0, 0).at(0)
    with pytest.raises(DataError, match="prompt a: its metadata are no plain values"):
        Panel.of([Prompt(prompt_id="a", env="e", metadata={"x": object()})])


def test_a_panel_is_hashed_with_its_contents_and_order():
    one, two = (Prompt(prompt_id=name, env="e", metadata={"n": name}) for name in "ab")
    changed = Prompt(prompt_id="a", env="e", metadata={"n": "c"})
    hashes = {Panel.of(prompts).sha256 for prompts in ([one, two], [two, one], [changed, two])}
    assert len(hashes) == 3 and Panel.of([one, two]).sha256 in hashes
