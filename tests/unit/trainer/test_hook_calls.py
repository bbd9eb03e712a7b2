"""Who is called when, and what a run says of a hook that fails or gives something else."""

import ast
import errno
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_spear
from megatron_spear.errors import CheckpointError, HookError, StopRequested
from megatron_spear.metrics import RUN_PREFIXES
from megatron_spear.testing.hand_made import make_group, make_sample
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.types import (
    Coefficients,
    Origin,
    Reward,
    ScoredGroup,
    StepContext,
    StepReport,
    TrajectoryGroup,
    Update,
)

CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=0.5),
    seed=7,
)
GROUPS = (make_group("g", [1.0, 0.0]),)
REPORT = StepReport(step=3, policy_version=3, metrics={})
PLAYED = (
    TrajectoryGroup(
        group_id="g",
        prompt=GROUPS[0].prompt,
        members=tuple(member.trajectory for member in GROUPS[0].members),
    ),
)
POINTS: dict[str, Callable[[HookCalls], Any]] = {
    "on_played in step 3": lambda calls: calls.on_played(CTX, PLAYED),
    "on_scored in step 3": lambda calls: calls.on_scored(CTX, GROUPS),
    "on_samples in step 3": lambda calls: calls.on_samples(CTX, [make_sample()]),
    "extra_updates in step 3": lambda calls: calls.extra_updates(CTX),
    "metrics in step 3": lambda calls: calls.metrics(CTX),
    "on_step_end in step 3": lambda calls: calls.on_step_end(CTX, REPORT),
    "state_dict after step 3": lambda calls: calls.state_dict(3),
    "load_state_dict at the resume": lambda calls: calls.load_state_dict({"odd": {}}),
    "prune after a checkpoint": lambda calls: calls.prune([{"odd": {}}]),
}


class _Odd(Hook):
    """Answers every call with a ready value, or raises it."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def _call(self, *arguments: Any) -> Any:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    on_played = on_scored = on_samples = extra_updates = metrics = _call
    on_step_end = state_dict = load_state_dict = prune = _call


def _odd(answer: Any) -> HookCalls:
    return HookCalls({"odd": _Odd(answer)})


@pytest.mark.parametrize("point", POINTS)
def test_one_that_raises_is_named_with_point_and_step(
    point: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(HookError) as told, caplog.at_level(logging.ERROR):
        POINTS[point](_odd(KeyError("mug")))
    message = str(told.value)
    assert message.startswith(f"hook 'odd' (_Odd): {point} raised KeyError: 'mug' (test_hook_calls")
    assert "What was saved is untouched" in message and "resume=DIR" in message
    assert f"hook 'odd' (_Odd): {point} raised:" in caplog.text
    assert "Traceback" in caplog.text and "raise self._answer" in caplog.text


@pytest.mark.parametrize(
    "error", [StopRequested("Ctrl-C"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()]
)
def test_what_is_not_the_hooks_fault_passes_through(error: BaseException) -> None:
    for call in POINTS.values():
        with pytest.raises(type(error)) as told:
            call(_odd(error))
        assert told.value is error


@pytest.mark.parametrize("point", POINTS)
def test_a_damaged_file_of_a_hook_stays_a_checkpoint_error(point: str) -> None:
    """A resume goes back to an older checkpoint for it."""
    with pytest.raises(CheckpointError, match=r"hook 'odd' \(_Odd\): .*: rows are gone"):
        POINTS[point](_odd(CheckpointError("rows are gone")))


def _rewarded(outcome: Any) -> tuple[ScoredGroup, ...]:
    return (make_group("g", [Reward(outcome=outcome)]),)


UPDATE = Update(samples=(make_sample(),), origin=Origin.REPLAY)


@pytest.mark.parametrize(
    ("point", "answer", "expected"),
    [
        ("on_played", PLAYED, "gave a tuple; expected nothing"),
        ("on_scored", None, "gave None; expected a tuple of ScoredGroup"),
        ("on_scored", list(GROUPS), "gave a list; expected a tuple of ScoredGroup"),
        ("on_scored", (GROUPS[0], 1), "gave a int at index 1 of a tuple; expected a tuple of Sc"),
        ("on_scored", _rewarded(float("nan")), "gave Reward(outcome=nan, "),
        ("on_scored", _rewarded(None), "to g/0; expected finite numbers"),
        ("on_scored", (replace(GROUPS[0], members=[]),), "as members of a group gave a list; exp"),
        ("on_samples", [], "gave a list; expected nothing"),
        ("extra_updates", None, "gave None; expected a list of Update"),
        ("extra_updates", (UPDATE,), "gave a tuple; expected a list of Update"),
        ("extra_updates", [make_sample()], "gave a TrainSample at index 0 of a list; expected a"),
        (
            "extra_updates",
            [replace(UPDATE, samples=[make_sample()])],
            "as samples of an update gav",
        ),
        ("extra_updates", [replace(UPDATE, samples=(GROUPS[0],))], "expected a tuple of TrainSamp"),
        ("extra_updates", [replace(UPDATE, origin="replay")], "origin 'replay'; expected a member"),
        ("extra_updates", [replace(UPDATE, weight=float("inf"))], "weight inf; expected a finite"),
        ("extra_updates", [replace(UPDATE, weight=-1.0)], "weight -1.0; expected a finite number"),
        ("metrics", None, "gave None; expected a dict of numbers by metric name"),
        ("metrics", {"bonus": 1.0}, "the metric name 'bonus'; expected prefix/what"),
        ("metrics", {3: 1.0}, "the metric name 3; expected prefix/what"),
        ("metrics", {"odd/": 1.0}, "the metric name 'odd/'; expected prefix/what"),
        ("metrics", {"odd/x": "1"}, "gave a str as 'odd/x'; expected a number"),
        ("metrics", {"odd/x": True}, "gave a bool as 'odd/x'; expected a number"),
        ("metrics", {"odd/x": np.ones(2)}, "gave a ndarray as 'odd/x'; expected a number"),
        ("metrics", {"loss/policy": 1.0}, "expected a prefix that is not the run's own (curric"),
        ("metrics", {"eval/mine": 1.0}, "the metric name 'eval/mine'; expected a prefix that"),
        ("on_step_end", 0, "gave a int; expected nothing"),
        ("state_dict", None, "gave None; expected a dict of plain JSON values"),
        ("state_dict", [1], "gave [1]; expected a dict of plain JSON values"),
        ("state_dict", {"x": np.ones(1)}, "expected a dict of plain JSON values"),
        ("state_dict", {"x": (1, 2)}, "gave {'x': (1, 2)}; expected a dict of plain JSON values"),
        ("state_dict", {1: 2}, "expected a dict of plain JSON values"),
        ("state_dict", {"x": float("nan")}, "expected a dict of plain JSON values"),
        ("load_state_dict", {}, "gave a dict; expected nothing"),
        ("prune", 3, "gave a int; expected nothing"),
    ],
)
def test_what_a_point_does_not_take_is_told(point: str, answer: Any, expected: str) -> None:
    (key,) = [key for key in POINTS if key.startswith(f"{point} ")]
    with pytest.raises(HookError) as told:
        POINTS[key](_odd(answer))
    message = str(told.value)
    assert message.startswith(f"hook 'odd' (_Odd): {key}") and expected in message, message


class _Counts(Hook):
    """Numbers what it sees; its state is the count."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.count, self.kept = prefix, 0, []

    def metrics(self) -> dict[str, float]:
        return {f"{self.prefix}/count": np.float32(self.count)}

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        sample = make_sample(self.prefix)
        return [Update(samples=(sample,), origin=Origin.REPLAY)]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]

    def prune(self, kept: Any) -> None:
        self.kept = [state["count"] for state in kept]


def test_values_and_states_of_all_hooks_by_name() -> None:
    a, b = _Counts("one"), _Counts("two")
    calls = HookCalls({"a": a, "b": b})
    a.count, b.count = 1, 2
    assert calls.metrics(CTX) == {"one/count": 1.0, "two/count": 2.0}
    assert {type(value) for value in calls.metrics(CTX).values()} == {float}
    assert [u.samples[0].trajectory_id.group for u in calls.extra_updates(CTX)] == ["one", "two"]
    states = calls.state_dict(3)
    assert states == {"a": {"count": 1}, "b": {"count": 2}}
    a.count = b.count = 0
    calls.load_state_dict(dict(reversed(states.items())))
    assert (a.count, b.count) == (1, 2)
    calls.prune([states, {"a": {"count": 5}, "b": {"count": 6}}])
    assert (a.kept, b.kept) == ([1, 5], [2, 6])


def test_one_that_keeps_no_state_may_come_and_go_at_a_resume() -> None:
    class Looks(_Counts):
        keeps_state = False

    looks, counts = Looks("one"), _Counts("two")
    both = HookCalls({"looks": looks, "counts": counts})
    assert both.metrics(CTX) == {"one/count": 0.0, "two/count": 0.0}, "it is called as others are"
    states = both.state_dict(3)
    assert states == {"counts": {"count": 0}}
    HookCalls({"counts": counts}).load_state_dict(states)
    both.load_state_dict(states)
    both.prune([states])
    assert counts.kept == [0] and looks.kept == []


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({"a": {"count": 1}}, r"missing \['b'\], unknown \[\]"),
        ({"a": {"count": 1}, "b": {"count": 1}, "c": {}}, r"missing \[\], unknown \['c'\]"),
    ],
)
def test_states_of_other_hooks_are_refused_by_name(states: Any, expected: str) -> None:
    with pytest.raises(CheckpointError, match=f"hooks: saved state has keys .*{expected}"):
        HookCalls({"a": _Counts("one"), "b": _Counts("two")}).load_state_dict(states)


def test_two_hooks_do_not_report_the_same_metric() -> None:
    calls = HookCalls({"a": _Counts("one"), "b": _Counts("one")})
    with pytest.raises(
        HookError, match=r"hook 'b' .* gave 'one/count', which hook 'a' reports too"
    ):
        calls.metrics(CTX)


def test_the_prefixes_of_the_run_are_all_listed() -> None:
    """Every text of the package that reads as a metric's name begins with one of them; environments
    report none, and name their draws and tasks so."""
    found, package = set(), Path(megatron_spear.__file__).parent
    for path in set(package.rglob("*.py")) - set((package / "envs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                match = re.fullmatch(r"([a-z_]+)/[a-z0-9_]*", node.value)
                found.update([match[1]] if match else [])
    others = {
        "runs",
        "data",  # both folders, the second in what torch saves
        "application",  # a MIME type
        "tokens",  # a unit
        "throughput",  # what the report makes of metrics
    }
    assert found - others == RUN_PREFIXES
