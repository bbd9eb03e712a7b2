"""Every hook of the package keeps to the contract, and the contract finds what breaks it."""

import re
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.config.hooks import HookSection
from megatron_spear.config.method import AlgorithmSection, ReplaySection, TaskSamplingSection
from megatron_spear.curriculum.task_sampling import TaskSampler
from megatron_spear.replay.state import require_keys
from megatron_spear.testing.contract import ContractViolation
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.testing.hooks import (
    STEPS,
    check_hook,
    check_metrics,
    check_records_unchanged,
    check_resume,
    check_returns,
    check_state,
    check_updates,
    made_up_groups,
)
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.curriculum import CurriculumHook
from megatron_spear.trainer.hooks.official_replay import OfficialReplayHook
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.trainer.hooks.user import user_hooks
from megatron_spear.types import TASK_TYPES, Origin, StepContext, TrainSample, Update

REPLAY = ReplaySection(capacity=12, max_age=3, rows_per_step=2, baseline_history=20)


def _self_imitation(folder: Path) -> Hook:
    return SelfImitationHook(REPLAY, folder)


def _official(folder: Path) -> Hook:
    replay = ReplaySection(capacity=2, max_age=5, baseline_history=200)
    return OfficialReplayHook(replay, AlgorithmSection(), 4, folder)


@pytest.mark.parametrize("make", [_self_imitation, _official])
def test_replay_keeps_the_contract(make: Callable[[Path], Hook]) -> None:
    replayed: list[TrainSample] = []

    def watched(folder: Path) -> Hook:
        hook: Any = make(folder)
        release = hook.extra_updates

        def extra_updates(ctx: StepContext) -> list[Update]:
            updates: list[Update] = release(ctx)
            replayed.extend(sample for update in updates for sample in update.samples)
            return updates

        hook.extra_updates = extra_updates
        return hook

    check_updates(watched)
    assert len(replayed) >= 6, "the steps exercise the replay"
    check_hook(make)


def test_the_curriculum_keeps_the_contract() -> None:
    def make(folder: Path) -> Hook:
        sampler = TaskSampler(TASK_TYPES, TaskSamplingSection())
        return CurriculumHook(sampler, lambda prompt: prompt.prompt_id.split("-")[0])

    check_hook(make)


def test_a_hook_that_does_nothing_keeps_the_contract() -> None:
    check_hook(lambda folder: Hook())


def test_the_documented_example_keeps_the_contract(
    documented_hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own test on the page, and with the settings there."""
    monkeypatch.syspath_prepend(documented_hook.folder)
    monkeypatch.delitem(sys.modules, "rare_types", raising=False)
    found = runpy.run_path(str(documented_hook.folder / "page_test.py"))
    tests = [value for name, value in found.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
    monkeypatch.chdir(documented_hook.folder)
    entries = [HookSection(**entry) for entry in documented_hook.entries]
    check_hook(lambda folder: user_hooks(entries)["rare_types"])


def test_the_documented_example_does_what_it_says(
    documented_hook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: after step 1 (1 of 4 won, 2 of 4, 1 of 4) its three types are rare below 0.6."""
    monkeypatch.chdir(documented_hook.folder)
    (entry,) = documented_hook.entries
    hook = user_hooks([HookSection(**entry)])["rare_types"]
    ctx: Any = None
    first = made_up_groups(1)
    assert hook.on_scored(ctx, first) == first, "nothing is known to be rare yet"
    assert sorted(hook.metrics().values()) == [0.0, 0.25, 0.25, 0.5]
    paid = hook.on_scored(ctx, first)
    for group, before in zip(paid, first, strict=True):
        for member, old in zip(group.members, before.members, strict=True):
            bonus = 0.3 if old.trajectory.won else 0.0
            assert member.reward.outcome == pytest.approx(old.reward.outcome + bonus)
    assert hook.metrics()["rare_types/num_bonuses"] == 4.0


def test_the_page_names_every_point(documented_hook: Any) -> None:
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", documented_hook.page, re.MULTILINE)
    points = {
        name: value.__code__.co_varnames[1 : value.__code__.co_argcount]
        for name, value in vars(Hook).items()
        if callable(value) and not isinstance(value, type)
    }
    assert {name: tuple(filter(None, re.split(", ?", a))) for name, a in rows} == points


class _Keeps(Hook):
    """A sound hook to be broken: its bonus and its metric depend on the steps it has seen."""

    def __init__(self, folder: Path) -> None:
        self.seen = 0

    def on_scored(self, ctx, groups):
        self.seen += 1
        return groups

    def metrics(self):
        return {"keeps/seen": float(self.seen)}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        require_keys(state, ("seen",), "_Keeps")
        self.seen = state["seen"]


def test_the_hook_to_be_broken_is_sound() -> None:
    check_hook(_Keeps)


class _ForgetsToReturn(_Keeps):
    def on_scored(self, ctx, groups):
        super().on_scored(ctx, groups)


class _Raises(_Keeps):
    def on_step_end(self, ctx, report):
        if ctx.step == STEPS:
            raise ZeroDivisionError("in the last step")


class _NoPrefix(_Keeps):
    def metrics(self):
        return {"seen": 1.0}


class _NeedsAFile(_Keeps):
    def prune(self, kept):
        (state,) = kept
        raise FileNotFoundError(state["seen"])


class _EditsAdvantages(_Keeps):
    def on_samples(self, ctx, samples):
        samples[0].advantages[:] = 0.0


class _EditsThePrompt(_Keeps):
    """Later than the point where it was shown the record."""

    def on_scored(self, ctx, groups):
        self._groups = groups
        return super().on_scored(ctx, groups)

    def on_step_end(self, ctx, report):
        self._groups[0].prompt.metadata["seen"] = ctx.step


class _EditsTheReport(_Keeps):
    def on_step_end(self, ctx, report):
        report.metrics["keeps/more"] = 1.0


class _NotANumber(_Keeps):
    def metrics(self):
        return {"keeps/seen": float("nan") if self.seen == 2 else 1.0}


class _Adds(_Keeps):
    """Adds these samples to every step."""

    samples: tuple[Any, ...] = ()

    def extra_updates(self, ctx):
        return [Update(samples=self.samples, origin=Origin.REPLAY)]


class _AddsNan(_Adds):
    samples = (make_sample(advantage=float("nan")),)


class _AddsObservations(_Adds):
    samples = (replace(make_sample(), advantages=np.ones(3, np.float32)),)


class _AddsTwice(_Adds):
    samples = (make_sample("a"), make_sample("b"), make_sample("a"))


class _AddsAPart(_Adds):
    samples = (make_sample(segment=2, num_segments=2),)


class _AddsIntegers(_Adds):
    samples = (replace(make_sample(), response_mask=np.array([0, 1, 1])),)


class _AddsColumns(_Adds):
    samples = (replace(make_sample(), old_logprobs=np.zeros((3, 1), np.float32)),)


class _StateOfTuples(_Keeps):
    def state_dict(self):
        return {"seen": (self.seen,)}


class _TakesAnyState(_Keeps):
    def load_state_dict(self, state):
        self.seen = state.get("seen", 0)


class _TakesMoreState(_Keeps):
    def load_state_dict(self, state):
        self.seen = state["seen"]


class _LosesState(_Keeps):
    def load_state_dict(self, state):
        require_keys(state, ("seen",), "_LosesState")


class _ForgetsItsState(_Keeps):
    def state_dict(self):
        return {}

    def load_state_dict(self, state: Mapping[str, Any]):
        require_keys(state, (), "_ForgetsItsState")


class _DrawsFromAStream(_Keeps):
    """The rewards depend on how often it was asked in this process."""

    stream = np.random.default_rng(0)

    def on_scored(self, ctx, groups):
        first, *others = super().on_scored(ctx, groups)
        member, *rest = first.members
        paid = replace(member, reward=replace(member.reward, outcome=float(self.stream.random())))
        return (replace(first, members=(paid, *rest)), *others)


class _LeavesATrace(_Keeps):
    """A file counts the steps, those of an abandoned future too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file = folder / "steps"

    def on_step_end(self, ctx, report):
        with self._file.open("a") as stream:
            stream.write("x")

    def metrics(self):
        return {"keeps/steps": float(len(self._file.read_text())) if self._file.exists() else 0.0}


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (check_returns, _ForgetsToReturn, "on_scored in step 1 gave None; expected a tuple"),
        (check_returns, _Raises, "on_step_end in step 6 raised ZeroDivisionError"),
        (check_returns, _NoPrefix, "the metric name 'seen'; expected prefix/what"),
        (check_returns, _NeedsAFile, "prune after a checkpoint raised FileNotFoundError"),
        (check_records_unchanged, _EditsAdvantages, "on_samples was shown in step 1 was changed"),
        (check_records_unchanged, _EditsThePrompt, "on_scored was shown in step 1 was changed"),
        (check_records_unchanged, _EditsTheReport, "on_step_end was shown in step 1 was changed"),
        (check_metrics, _NotANumber, "in step 2 the metric 'keeps/seen' is nan"),
        (check_updates, _AddsNan, "advantages is .*nan.* expected finite"),
        (check_updates, _AddsObservations, "expected 0 outside response_mask"),
        (check_updates, _AddsTwice, "a/0 segment 0 is twice"),
        (check_updates, _AddsAPart, "segment 2: it is one of 2 segments; expected segment <"),
        (check_updates, _AddsIntegers, "response_mask is int64; expected bool"),
        (check_updates, _AddsColumns, "old_logprobs is .*expected an array of 3 entries"),
        (check_state, _StateOfTuples, "expected a dict of plain JSON values"),
        (check_state, _TakesAnyState, "without 'seen' was taken; expected a CheckpointError"),
        (check_state, _TakesMoreState, "without 'seen': .*KeyError.*; expected a CheckpointError"),
        (check_state, _LosesState, "after step 1 the state comes back as"),
        (check_resume, _ForgetsItsState, "stopped after step 1, in step 2, metrics are"),
        (check_resume, _DrawsFromAStream, "stopped after step 1, in step 2, groups are"),
        (check_resume, _LeavesATrace, "stopped after step 1, in step 2, metrics are"),
    ],
)
def test_contract_finds_what_is_broken(
    check: Callable[[Callable[[Path], Hook]], None], broken: type[Hook], message: str
) -> None:
    with pytest.raises(ContractViolation, match=message):
        check(broken)


def test_contract_finds_a_state_that_takes_more_keys() -> None:
    class TakesMore(_Keeps):
        def load_state_dict(self, state):
            if "seen" not in state:
                require_keys(state, ("seen",), "TakesMore")
            self.seen = state["seen"]

    with pytest.raises(ContractViolation, match="a state with another key was taken"):
        check_state(TakesMore)


def test_contract_finds_updates_that_differ_after_a_resume() -> None:
    class Counts(_Keeps):
        """The weight of its update is not in the state."""

        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self._calls = 0

        def extra_updates(self, ctx):
            self._calls += 1
            return [Update(samples=(make_sample(),), origin=Origin.REPLAY, weight=self._calls)]

    with pytest.raises(ContractViolation, match="in step 2, updates are"):
        check_resume(Counts)
