"""Every family of the package keeps to the contract, and the contract finds what breaks it."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_spear.config.environments.alfworld import AlfworldSection
from megatron_spear.config.environments.custom import CustomSection
from megatron_spear.config.environments.math_code import MathCodeSection
from megatron_spear.config.environments.webshop import WebshopSection
from megatron_spear.data.prompts import FreshPrompts, PoolPrompts
from megatron_spear.envs.family import Panel, family_of
from megatron_spear.envs.plain_view import PlainView
from megatron_spear.envs.simple import SimpleFamily
from megatron_spear.envs.views import ParsedAction
from megatron_spear.testing.contract import ContractViolation
from megatron_spear.testing.families import (
    PANEL,
    TRAINING,
    check_demonstrations,
    check_environments,
    check_family,
    check_in_another_process,
    check_kinds,
    check_panel,
    check_prompts,
    check_view,
)
from megatron_spear.testing.sandboxes import why_no_sandbox
from megatron_spear.testing.toy_environment import CorridorEnvironment

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom" / "number_game.py"


@pytest.mark.parametrize("prompt", ["compact", "official"])
def test_alfworld_keeps_the_contract(prompt):
    check_family(AlfworldSection(prompt=prompt), actions=["look", "inventory"])


@pytest.mark.parametrize("prompt", ["compact", "official"])
def test_webshop_keeps_the_contract(prompt):
    check_family(WebshopSection(prompt=prompt), actions=["search[red]", "click[next >]"])


@pytest.mark.skipif(bool(why_no_sandbox()), reason=why_no_sandbox())
@pytest.mark.parametrize("prompt", ["compact", "official"])
def test_math_with_code_keeps_the_contract(prompt):
    check_family(MathCodeSection(prompt=prompt), actions=["\\boxed{1}"], distinct=0)


def test_the_example_keeps_the_contract():
    check_family(CustomSection(family=f"{EXAMPLE}:NumberGame"), actions=["1"], distinct=0)


class Corridors(SimpleFamily):
    """Corridors to walk, short and long ones."""

    environment = CorridorEnvironment
    task_kinds = ("short", "long")

    def make_task(self, rng):
        length = rng.randint(4, 400)
        return {"length": length, "start": max(length - rng.randint(3, 9), 0)}

    def kind(self, task):
        return "short" if task["length"] < 20 else "long"

    def expert(self, task, observation, turns):
        return "right"


def test_the_toy_keeps_the_contract():
    check_family(Corridors(), actions=["right"])


class _Drifts(Corridors):
    def training(self, order_seed, made_seed):
        seen = random.Random(1)
        return FreshPrompts(lambda index: self.prompt({"length": seen.randint(3, 10**9)}))


class _Repeats(Corridors):
    def make_task(self, rng):
        return {"length": 7, "start": 2}

    held_out_every = 1_000_003


class _OneName(Corridors):
    def prompt(self, task):
        return replace(super().prompt(task), prompt_id="corridor")


class _Unpicklable(Corridors):
    def prompt(self, task):
        return replace(super().prompt(task), metadata={"make": lambda: task})


class _TrainsOnThePanel(Corridors):
    def panel(self, size, made_seed):
        source = self.training(*TRAINING)
        return Panel.of([source.at(index) for index in range(size)])


class _NewPanels(Corridors):
    def panel(self, size, made_seed):
        return super().panel(size, random.randrange(10**9))


class _SmallPanel(Corridors):
    def panel(self, size, made_seed):
        return super().panel(size - 1, made_seed)


class _OtherKind(Corridors):
    task_kinds = ("short", "lengthy")


class _MixedKinds(Corridors):
    def training_by_kind(self, order_seed, made_seed):
        return dict.fromkeys(self.task_kinds, self.training(order_seed, made_seed))


class _Shown(Corridors):
    """With a view that a test replaces."""

    shown = PlainView

    def view(self):
        return self.shown()


class _Deaf(PlainView):
    def parse(self, text):
        return ParsedAction("left", True)


class _Fragile(PlainView):
    def parse(self, text):
        text.encode()
        return super().parse(text)


class _OneMessage(PlainView):
    def full(self, observation, info, turn):
        return {"role": "user", "content": observation}


class _NoRole(PlainView):
    def window(self, *arguments):
        return ({"content": "you see"},)


class _EndsWithAnAnswer(PlainView):
    def window(self, *arguments):
        return (*super().window(*arguments), {"role": "assistant", "content": "right"})


class _RepeatsAnswers(PlainView):
    def window(self, *arguments):
        return ({"role": "assistant", "content": "right"}, *super().window(*arguments))


class _AllVoid(PlainView):
    def void(self, text):
        return True


def _with_view(view):
    return type(view.__name__, (_Shown,), {"shown": view})


class _HalfWay(Corridors):
    """Demonstrations that stop before the goal."""

    def demonstration(self, section, made_seed, index):
        played = super().demonstration(section, made_seed, index)
        return replace(played, turns=played.turns[:-1])


class _OfAnotherTask(Corridors):
    def demonstration(self, section, made_seed, index):
        played = super().demonstration(section, made_seed, index)
        other = self.prompt({"length": 900, "start": 3})
        return replace(played, prompt=other)


class _OfNoTask(Corridors):
    def demonstration(self, section, made_seed, index):
        return replace(super().demonstration(section, made_seed, index), prompt=None)


class _OfThePanel(Corridors):
    def demonstration(self, section, made_seed, index):
        played = super().demonstration(section, made_seed, index)
        return replace(played, prompt=self.panel(4, PANEL).prompts[0])


class _Moody(Corridors):
    def expert(self, task, observation, turns):
        return random.choice(["left", "right", "right"])


class _GoesOn(CorridorEnvironment):
    """Takes steps after the end."""

    def step(self, action):
        if self._place == self._goal:
            self._place -= 1
        return super().step(action)


class _Slow(CorridorEnvironment):
    def reset(self, *, seed, options):
        import time

        time.sleep(0.2)
        return super().reset(seed=seed, options=options)


class _AfterTheEnd(Corridors):
    environment = _GoesOn


class _SlowCorridors(Corridors):
    environment = _Slow


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (check_prompts, _Drifts, "asked for again"),
        (check_prompts, _Repeats, "the first 8 training prompts"),
        (
            lambda family: check_prompts(family, distinct=0),
            _OneName,
            "named corridor are not equal",
        ),
        (check_prompts, _Unpicklable, "cannot be pickled"),
        (check_panel, _TrainsOnThePanel, "on the panel and trained on"),
        (check_panel, _NewPanels, "the panel, asked for again"),
        (check_panel, _SmallPanel, "a Panel of 4 prompts"),
        (check_kinds, _OtherKind, "is of kind 'long'; expected one of short, lengthy"),
        (check_kinds, _MixedKinds, "training_by_kind\\['short'\\] gave kind 'long'"),
        (check_view, _with_view(_Deaf), "parse\\('right'\\) is"),
        (check_view, _with_view(_Fragile), "any text"),
        (check_view, _with_view(_OneMessage), "a tuple of messages"),
        (check_view, _with_view(_NoRole), "role"),
        (check_view, _with_view(_EndsWithAnAnswer), "role .system, user, tool. and content"),
        (check_view, _with_view(_AllVoid), "void\\('right'\\) is True"),
        (check_demonstrations, _HalfWay, "goes on"),
        (check_demonstrations, _OfAnotherTask, "played again, shows"),
        (check_demonstrations, _OfNoTask, "has prompt None"),
        (check_demonstrations, _OfThePanel, "on the panel; expected a training task"),
        (check_demonstrations, _Moody, "asked for again"),
        (check_environments, _AfterTheEnd, "after the end"),
        (lambda family: check_environments(family, max_step_s=0.1), _SlowCorridors, "reset took"),
    ],
)
def test_contract_finds_what_is_broken(check, broken, message):
    with pytest.raises(ContractViolation, match=message):
        check(broken())


def test_a_window_may_repeat_answers():
    check_view(_with_view(_RepeatsAnswers)())


def test_a_list_of_tasks_keeps_the_contract():
    class Listed(Corridors):
        def tasks(self):
            return [{"length": length, "start": length - 3} for length in range(10, 60)]

    family = Listed()
    for check in (check_prompts, check_panel, check_kinds, check_view, check_demonstrations):
        check(family)
    assert isinstance(family.training(0, 0), PoolPrompts)


BROKEN_IN_A_PROCESS = """
{first_line}
from megatron_spear.envs.simple import SimpleFamily
from megatron_spear.testing.toy_environment import CorridorEnvironment

class Corridor(CorridorEnvironment):
    pass

class Corridors(SimpleFamily):
    environment = Corridor

    def make_task(self, rng):
        return {{"length": rng.randint(3, 400), "start": {start}}}
"""


@pytest.mark.parametrize(
    ("first_line", "start", "message"),
    [
        ("import torch", "1", "also imports \\['torch'"),
        ("import os", "len(os.environ.get('PYTHONHASHSEED', ''))", "in another process prompts"),
    ],
)
def test_contract_finds_what_another_process_does(tmp_path, first_line, start, message):
    assert os.environ.get("PYTHONHASHSEED", "") != "4242"
    file = tmp_path / "corridors.py"
    file.write_text(BROKEN_IN_A_PROCESS.format(first_line=first_line, start=start))
    with pytest.raises(ContractViolation, match=message):
        check_in_another_process(CustomSection(family=f"{file}:Corridors"))


def test_a_family_is_made_once_for_equal_settings():
    section = CustomSection(family=f"{EXAMPLE}:NumberGame", settings={"highest": 30})
    same = CustomSection(family=f"{EXAMPLE}:NumberGame", settings={"highest": 30})
    assert family_of(section) is family_of(same)
    assert family_of(section) is not family_of(CustomSection(family=f"{EXAMPLE}:NumberGame"))
